-- Admit jobs to one queue, all or none.
--
-- KEYS  1 rq:queue:{queue}  list     2 vf:load:{queue}  hash    3 vf:bell:{line}   list
--       4 rq:queues         set      5 vf:sub:{sub}     hash    6 vf:sub:{sub}:ok  bitmap
--       7 vf:sub:{sub}:bad  bitmap   8 vf:version:{uid} string  9 vf:load:{merge queue} hash
--       10 vf:outstanding:{uid} zset
--       (5 to 10 are named but not touched where ARGV leaves the submission or the merge queue out)
--       rq:job:{id}         hash     one for each job, named after the ids in ARGV
--       vf:alive:{box} string, vf:sub:{sub}:errors list, vf:subs:{tenant} zset, vf:dead hash
--       vf:line:{line} zset, vf:clock:{line} zset, vf:sum:{line} hash, vf:sum:merge hash: named after
--       the queue. The line is its name without `vf.{tenant}.`: all tenants' queues for one work
-- ARGV  1 queue   2 time, ISO 8601, for RQ's readers   3 most tokens waiting   4 most bytes waiting
--       5 reply box or ''   6 deadline, ms from now, or 0   7 submission or ''
--       8 merge queue or ''   9 most bytes waiting in the merge queue   10 '1': assign versions
--       11 most bytes waiting in the queues of all tenants for this work
--       12 most bytes waiting in all merge queues   13 most tokens that may be served before these jobs, or 0
--       14 most bytes in the dead letters of all tenants, or 0
--       then for each job: id, block, tokens, documents, data
-- Returns {verdict, tokens waiting, bytes waiting, one number a job}
--       verdict: 'ok', 'full', 'shared_full', 'merge_full', 'dead_full' (instead of the bytes waiting
--       those in the tenant's dead letter), 'late', 'cancelled', 'misnamed' (the queue: one is
--       vf.{tenant}.{task}.{target}.{lane}, of letters, digits, _, - and dots) or 'invalid' (tokens and
--       documents are whole numbers below 2^31, block below 2^24); unless 'ok', nothing was written
--       a job's number: its assigned version, 0 where none is assigned, -1 already queued,
--       -2 already committed, -3 already refused
local FIRST, STRIDE = 15, 5
local JOB_BYTES = 1500  -- what Redis pays for a job beside its data; the same wherever jobs are counted
local ALIVE_S = 30  -- as the reply box has it
local queue, iso, box, sub, merge_queue = ARGV[1], ARGV[2], ARGV[5], ARGV[7], ARGV[8]
local max_tokens, max_bytes, ttl_ms = tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[6])

local tenant, line = string.match(queue, '^vf%.([%w_-]+)%.(%a+%.[%w_.-]+%.%a+)$')
if not line then return {'misnamed', 0, 0} end
local merges = string.sub(line, 1, 6) == 'merge.'
local sum = 'vf:sum:' .. (merges and 'merge' or line)
local max_shared, max_unmerged = tonumber(ARGV[merges and 12 or 11]), tonumber(ARGV[12])

local function text(number) return string.format('%.0f', number) end

-- What is left for others is what one may hold: n that hold all they may leave 1/(n+1) free, so that
-- none, nor many together, keep the others out.
local function left_in(key, most)
  local held = tonumber(redis.call('HGET', key, 'bytes') or 0)
  return held > 0 and math.max(0, most - held) or math.huge
end

-- A queue that was empty goes to where the line is now; one that was served in advance waits for
-- it. worker/claim.lua moves the line on.
local function join_line()
  local places, clock = 'vf:line:' .. line, 'vf:clock:' .. line
  if merges or redis.call('ZSCORE', places, queue) then return end
  local now = tonumber(redis.call('ZRANGE', places, 0, 0, 'WITHSCORES')[2] or 0)
  local served = tonumber(redis.call('ZSCORE', clock, queue) or 0)
  redis.call('ZADD', places, text(math.max(now, served)), queue)
end

local waiting = redis.call('HMGET', KEYS[2], 'tokens', 'bytes')
local tokens, bytes = tonumber(waiting[1] or 0), tonumber(waiting[2] or 0)

local record = sub ~= '' and redis.call('HMGET', KEYS[5], 'state', 'ttl_s') or {}
if record[1] == 'cancelled' then return {'cancelled', tokens, bytes} end

-- Tokens that are served before what comes now: tenants that have something waiting take turns.
local function ahead()
  local everyone = tonumber(redis.call('HGET', sum, 'tokens') or 0)
  local tenants = redis.call('ZCARD', 'vf:line:' .. line)
  return math.min(tokens * math.max(1, tenants), math.max(tokens, everyone))
end

local function is_below(limit, value)
  local number = tonumber(value)
  return number and number >= 0 and number == math.floor(number) and number < limit
end
for at = FIRST, #ARGV, STRIDE do
  -- A bitmap is as long as its highest bit says: 2^24 bits are 2 MiB, 2^31 would be 256.
  if not (is_below(2 ^ 24, ARGV[at + 1]) and is_below(2 ^ 31, ARGV[at + 2])
    and is_below(2 ^ 31, ARGV[at + 3])) then
    return {'invalid', tokens, bytes}
  end
end

local numbers, fresh, fresh_tokens, fresh_bytes = {}, {}, 0, 0
for at = FIRST, #ARGV, STRIDE do
  local id, block = ARGV[at], ARGV[at + 1]
  local number = 0
  if sub ~= '' and redis.call('GETBIT', KEYS[6], block) == 1 then number = -2
  elseif sub ~= '' and redis.call('GETBIT', KEYS[7], block) == 1 then number = -3
  elseif redis.call('EXISTS', 'rq:job:' .. id) == 1 then number = -1
  else
    fresh[#fresh + 1] = at
    fresh_tokens = fresh_tokens + tonumber(ARGV[at + 2])
    fresh_bytes = fresh_bytes + #ARGV[at + 4] + JOB_BYTES
  end
  numbers[#numbers + 1] = number
end

-- Why what is new may not come in; nil where it may.
local function refusal()
  -- What nobody waits for may end in the dead letter, where it stays for long. One half goes
  -- as above, the other by shares that what others have there does not touch: Admission has the sum.
  local most_dead = tonumber(ARGV[14])
  if most_dead > 0 and not merges and (box == '' or sub ~= '') then
    local dead = redis.call('HMGET', 'vf:dead', tenant, '*')
    local own, left = tonumber(dead[1] or 0), most_dead / 2 - tonumber(dead[2] or 0)
    local tenants = math.max(1, redis.call('HLEN', 'vf:dead') - 1)
    if own > 0 and own > math.max(left, 3 * most_dead / (4 * tenants * (tenants + 1))) then
      return {'dead_full', tokens, own}
    end
  end
  if merge_queue ~= '' then
    local found = redis.call('HMGET', KEYS[9], 'bytes', 'parked_bytes')
    local unmerged = tonumber(found[1] or 0) + tonumber(found[2] or 0)
    if unmerged > math.min(tonumber(ARGV[9]), left_in('vf:sum:merge', max_unmerged)) then
      return {'merge_full', tokens, unmerged}
    end
  end
  -- A call that is alone in the queue passes whatever its size: else it could never pass.
  if tokens > 0 and (tokens + fresh_tokens > max_tokens or bytes + fresh_bytes > max_bytes) then
    return {'full', tokens, bytes}
  end
  if bytes + fresh_bytes > left_in(sum, max_shared) then
    return {'shared_full', tokens, tonumber(redis.call('HGET', sum, 'bytes'))}
  end
  local max_ahead = tonumber(ARGV[13])
  if max_ahead > 0 and ahead() > max_ahead then return {'late', ahead(), bytes} end
end

local refused = #fresh > 0 and refusal()
if refused then return refused end

local time = redis.call('TIME')
local now_us = time[1] * 1000000 + time[2]
local deadline = ttl_ms > 0 and text(now_us / 1000 + ttl_ms) or ''
local version = nil
if ARGV[10] == '1' and #fresh > 0 then
  version = math.max(now_us, tonumber(redis.call('GET', KEYS[8]) or 0) + 1)
end

for _, at in ipairs(fresh) do
  local key, fields = 'rq:job:' .. ARGV[at], {
    'created_at', iso, 'enqueued_at', iso, 'origin', queue, 'status', 'queued',
    'data', ARGV[at + 4], 'vf_cost', ARGV[at + 2], 'vf_enqueued', text(now_us),
  }
  local function set(name, value)
    fields[#fields + 1] = name
    fields[#fields + 1] = value
  end
  if box ~= '' then set('vf_box', box) end
  if deadline ~= '' then set('vf_deadline', deadline) end
  if sub ~= '' then
    set('vf_sub', sub); set('vf_block', ARGV[at + 1]); set('vf_docs', ARGV[at + 3])
  end
  if merge_queue ~= '' then set('vf_merge', merge_queue) end
  local number = numbers[(at - FIRST) / STRIDE + 1]
  if version then
    set('vf_version', text(version))
    numbers[(at - FIRST) / STRIDE + 1] = version
    redis.call('ZADD', KEYS[10], text(version), ARGV[at])
    version = version + 1
  end
  redis.call('HSET', key, unpack(fields))
  redis.call('RPUSH', KEYS[1], ARGV[at])
end

if #fresh > 0 then
  if version then redis.call('SET', KEYS[8], text(version - 1)) end
  redis.call('SADD', KEYS[4], KEYS[1])
  for _, key in ipairs({KEYS[2], sum}) do
    redis.call('HINCRBY', key, 'tokens', fresh_tokens)
    redis.call('HINCRBY', key, 'bytes', fresh_bytes)
    redis.call('HINCRBY', key, 'jobs', #fresh)
  end
  join_line()
  if redis.call('LLEN', KEYS[3]) == 0 then redis.call('RPUSH', KEYS[3], '1') end
  -- A box whose sign of life was lost with Redis's data: its client, which calls, lives.
  if box ~= '' and redis.call('EXISTS', 'vf:alive:' .. box) == 0 then
    redis.call('SET', 'vf:alive:' .. box, '1', 'EX', ALIVE_S)
  end
end
-- A submission of which something was admitted lives its time from now on.
if is_below(2 ^ 31, record[2]) then
  local ttl_s = text(tonumber(record[2]))
  for at = 5, 7 do redis.call('EXPIRE', KEYS[at], ttl_s) end
  redis.call('EXPIRE', KEYS[5] .. ':errors', ttl_s)
  redis.call('HSETNX', KEYS[5], 'begun', '1')
  redis.call('ZADD', 'vf:subs:' .. tenant, 'XX', text(time[1] + ttl_s), sub)
end
return {'ok', tokens + fresh_tokens, bytes + fresh_bytes, unpack(numbers)}
