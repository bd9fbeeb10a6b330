-- Open, close, cancel or forget a submission.
--
-- KEYS  1 vf:sub:{sub} hash   2 vf:sub:{sub}:ok bitmap   3 vf:sub:{sub}:bad bitmap
--       4 vf:sub:{sub}:errors list
--       vf:subs:{tenant} zset: the tenant's submissions by when they are forgotten
-- ARGV  1 '' to open, 'cancel', 'forget', or how many blocks there are, to close it
--       2 documents; to open it, most submissions of the tenant that Redis may hold, or 0; to forget
--         it, seconds that are left to whoever is about to use it as well
--       3 TTL, s   then names and values to keep: `tenant` of whom it is counted, `once` with any
--       value where nobody asks for it by a name again, so that it may be forgotten soon after its end
-- Returns the submission's state; 'full' when the tenant has too many; '' when there is none to
--       cancel or forget. One into which nothing went lives UNUSED_S only; the first block that
--       enqueue.lua admits gives it its TTL.
-- A full Redis refuses to open one, but not to open it again, close or cancel it: that is what ends
-- the work that fills it. So where there is one, the first write is an EXPIRE.
local UNUSED_S, MOST_PRUNED, SPARE_S = 3600, 100, 60
-- As the ledger has them: how long one lives after its end, also where its tenant has many.
local DAY_S, HOUR_S, MINUTES_S, MANY, VERY_MANY = 86400, 3600, 300, 20000, 100000
local what, ttl_s = ARGV[1], tonumber(ARGV[3])
local id = string.sub(KEYS[1], #'vf:sub:' + 1)
local time = redis.call('TIME')
local now_s, now_ms = tonumber(time[1]), string.format('%.0f', time[1] * 1000 + time[2] / 1000)

local found = redis.call('HMGET', KEYS[1], 'state', 'tenant', 'begun', 'once')
local state, tenant, once = found[1], found[2], found[4]
for at = 4, #ARGV, 2 do
  if ARGV[at] == 'tenant' then tenant = tenant or ARGV[at + 1] end
end
local all = 'vf:subs:' .. (tenant or '-')

local function live(seconds)
  for _, key in ipairs(KEYS) do redis.call('EXPIRE', key, seconds) end
  redis.call('ZADD', all, 'XX', now_s + seconds, id)
end

local function keep()
  for at = 4, #ARGV, 2 do redis.call('HSETNX', KEYS[1], ARGV[at], ARGV[at + 1]) end
end

local function create()
  redis.call('HSET', KEYS[1], 'state', 'open', 'created_ms', now_ms, 'ttl_s', ttl_s)
  redis.call('ZADD', all, now_s + UNUSED_S, id)
  redis.call('EXPIRE', all, ttl_s + SPARE_S)
  local over = redis.call('ZRANGEBYSCORE', all, '-inf', now_s, 'LIMIT', 0, MOST_PRUNED)
  if #over > 0 then redis.call('ZREM', all, unpack(over)) end
  state = 'open'
end

if what == 'forget' then
  -- Others may have opened it too, under the same name: what they have begun stays.
  if not state or state ~= 'open' or found[3] then return state or '' end
  if tonumber(ARGV[2]) > 0 then
    live(tonumber(ARGV[2]))
  else
    redis.call('DEL', unpack(KEYS))
    redis.call('ZREM', all, id)
  end
  return state
end

if what == 'cancel' then
  if not state then return '' end
  if state == 'open' or state == 'closed' then
    live(ttl_s)
    redis.call('HSET', KEYS[1], 'state', 'cancelled')
    return 'cancelled'
  end
  return state
end

if what == '' then
  if state then
    if found[3] and state ~= 'done' then live(ttl_s)
    elseif state == 'open' then live(UNUSED_S) end
    keep()
    return state
  end
  local most = tonumber(ARGV[2])
  if most > 0 and redis.call('ZCOUNT', all, now_s, '+inf') >= most then return 'full' end
  create()
  keep()
  redis.call('EXPIRE', KEYS[1], UNUSED_S)
  return state
end

if state then redis.call('EXPIRE', KEYS[1], ttl_s) else create() end
keep()
if state == 'open' then
  redis.call('HSET', KEYS[1], 'blocks', what, 'documents', ARGV[2])
  local settled = redis.call('BITCOUNT', KEYS[2]) + redis.call('BITCOUNT', KEYS[3])
  state = settled >= tonumber(what) and 'done' or 'closed'
  redis.call('HSET', KEYS[1], 'state', state)
  if state == 'done' then redis.call('HSET', KEYS[1], 'done_ms', now_ms) end
end
if state == 'done' then  -- as the ledger has it
  local count = redis.call('ZCARD', all)
  if once then
    ttl_s = count > MANY and MINUTES_S or DAY_S
  elseif count > MANY then
    ttl_s = math.min(tonumber(ttl_s), count > VERY_MANY and HOUR_S or DAY_S)
  end
end
live(ttl_s)
return state
