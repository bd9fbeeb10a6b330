-- Take one job out of the dead letter: to try it again, or for good. Of two who want the same entry
-- one gets it.
--
-- KEYS  1 rq:job:{id} hash      2 rq:failed:{queue} zset   3 rq:queue:{queue} list
--       4 vf:load:{queue} hash  5 rq:queues set            6 rq:results:{id} stream
--       7 vf:outstanding:{uid} zset
--       vf:bell:{line} list, vf:line:{line} zset, vf:clock:{line} zset, vf:sum:{line} hash: named
--       after the queue, as in enqueue.lua; vf:load:{merge queue} hash, vf:sum:merge hash and
--       vf:sub:{submission} hash are read; vf:dead hash, vf:dead:hours hash
-- ARGV  1 'retry' or 'drop'   2 id   3 queue   4 vf_died as the caller read it   5 time, ISO 8601
--       of a retry also: 6 attempts to begin with   7 most tokens waiting   8 most bytes waiting
--       9 new data or ''   10 its tokens   11 to 13 most bytes waiting in the queues of all tenants,
--       in its merge queue, and in all merge queues
-- Returns 1 when it is done, 0 when the entry is not there as it was read, -1 when its submission was
--       cancelled, -2 when the queue is full, -3 when those of all tenants are, -4 when the merge
--       queue is. A full Redis refuses a retry as it refuses an enqueue, but not a drop.
local JOB_BYTES = 1500  -- as in enqueue.lua
local job, dead, list, load = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local id, queue = ARGV[2], ARGV[3]
local fields = redis.call('HMGET', job, 'status', 'vf_died', 'vf_sub', 'vf_cost', 'vf_version',
  'vf_merge', 'vf_kept')
if fields[1] ~= 'failed' or (fields[2] or '') ~= ARGV[4] or not redis.call('ZSCORE', dead, id) then
  return 0
end

local tenant, line = string.match(queue, '^vf%.([^.]*)%.(.+)$')
tenant, line = tenant or '-', line or queue

-- As the ledger counts what it buries.
local function uncount()
  local hour, bytes = string.match(fields[7] or '', '^(%d+) (%d+)$')
  local name = hour and hour .. ':' .. tenant
  local counted = hour and tonumber(redis.call('HGET', 'vf:dead:hours', name) or 0) or 0
  if counted == 0 then return end
  bytes = string.format('%.0f', -math.min(tonumber(bytes), counted))
  redis.call('HINCRBY', 'vf:dead:hours', name, bytes)
  for _, whose in ipairs({tenant, '*'}) do
    if redis.call('HINCRBY', 'vf:dead', whose, bytes) <= 0 then
      redis.call('HDEL', 'vf:dead', whose)
    end
  end
end

if ARGV[1] == 'drop' then
  redis.call('ZREM', dead, id)
  redis.call('DEL', job, KEYS[6])
  redis.call('ZREM', KEYS[7], id)
  uncount()
  return 1
end

local merges = string.sub(line, 1, 6) == 'merge.'
local bell, sum = 'vf:bell:' .. line, 'vf:sum:' .. (merges and 'merge' or line)
local data, tokens = ARGV[9], tonumber(fields[4] or 0)
if fields[3] and redis.call('HGET', 'vf:sub:' .. fields[3], 'state') == 'cancelled' then return -1 end
local size = #data
if data ~= '' then tokens = tonumber(ARGV[10]) else size = redis.call('HSTRLEN', job, 'data') end
size = size + JOB_BYTES

-- The limits are those of enqueue.lua.
local function left_in(key, most)
  local held = tonumber(redis.call('HGET', key, 'bytes') or 0)
  return held > 0 and math.max(0, most - held) or math.huge
end
local waiting = redis.call('HMGET', load, 'tokens', 'bytes')
local waits, bytes = tonumber(waiting[1] or 0), tonumber(waiting[2] or 0)
if waits > 0 and (waits + tokens > tonumber(ARGV[7]) or bytes + size > tonumber(ARGV[8])) then
  return -2
end
if bytes + size > left_in(sum, tonumber(ARGV[merges and 13 or 11])) then return -3 end
if fields[6] and fields[6] ~= '' and not merges then
  local found = redis.call('HMGET', 'vf:load:' .. fields[6], 'bytes', 'parked_bytes')
  local unmerged = tonumber(found[1] or 0) + tonumber(found[2] or 0)
  if unmerged > math.min(tonumber(ARGV[12]), left_in('vf:sum:merge', tonumber(ARGV[13]))) then
    return -4
  end
end

local function join_line()
  local places = 'vf:line:' .. line
  if merges or redis.call('ZSCORE', places, queue) then return end
  local now = tonumber(redis.call('ZRANGE', places, 0, 0, 'WITHSCORES')[2] or 0)
  local served = tonumber(redis.call('ZSCORE', 'vf:clock:' .. line, queue) or 0)
  redis.call('ZADD', places, string.format('%.0f', math.max(now, served)), queue)
end

-- The first write is one that a full Redis refuses.
local time = redis.call('TIME')
redis.call('HSET', job, 'status', 'queued', 'enqueued_at', ARGV[5], 'vf_attempts', ARGV[6],
  'vf_enqueued', string.format('%.0f', time[1] * 1000000 + time[2]))
redis.call('ZREM', dead, id)
redis.call('PERSIST', job)
uncount()
redis.call('HDEL', job, 'vf_died', 'vf_died_with', 'vf_error', 'vf_kept', 'vf_box', 'vf_deadline',
  'vf_left', 'ended_at', 'exc_info')
if data ~= '' then redis.call('HSET', job, 'data', data) end
if fields[4] then
  redis.call('HSET', job, 'vf_cost', tokens)
  for _, key in ipairs({load, sum}) do
    redis.call('HINCRBY', key, 'tokens', tokens)
    redis.call('HINCRBY', key, 'bytes', size)
    redis.call('HINCRBY', key, 'jobs', 1)
  end
end
-- Its version can arrive again: no tombstone above it may go meanwhile.
if tonumber(fields[5] or 0) > 0 and KEYS[7] ~= 'vf:outstanding:' then
  redis.call('ZADD', KEYS[7], fields[5], id)
end
redis.call('RPUSH', list, id)
redis.call('SADD', KEYS[5], list)
join_line()
if redis.call('LLEN', bell) == 0 then redis.call('RPUSH', bell, '1') end
return 1
