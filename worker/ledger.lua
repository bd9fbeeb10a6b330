-- What the worker's scripts share; put before each of them.
--
-- Keys named after a job's id, an execution's id and a queue's name:
--   rq:job:{id} hash           rq:queue:{queue} list      rq:wip:{queue} zset
--   rq:execution:{id}:{exec}   rq:executions:{id} zset    rq:failed:{queue} zset
--   rq:results:{id} stream     rq:queues set              vf:lease:{queue} zset
--   vf:load:{queue} hash       vf:bell:{queue} list       vf:alive:{box} string
--   vf:outstanding:{uid} zset
--   vf:reply:{box} list        vf:sub:{sub} hash, with :ok and :bad bitmaps and :errors list
--
-- A full Redis refuses a script whose first write may need memory. So each script's first write is
-- one that is never refused (ZREM, LPOP, EXPIRE, DEL); after it, Redis lets the rest pass.
local time = redis.call('TIME')
local now_us = time[1] * 1000000 + time[2]
local now_ms = now_us / 1000

local function text(number) return string.format('%.0f', number) end

-- Take the lease away. True for the one who may settle: this is the fence.
local function unlease(id, execution, queue)
  local member = id .. ':' .. execution
  local held = redis.call('ZREM', 'vf:lease:' .. queue, member) == 1
  redis.call('ZREM', 'rq:wip:' .. queue, member)
  redis.call('DEL', 'rq:execution:' .. member)
  redis.call('ZREM', 'rq:executions:' .. id, execution)
  return held
end

local function ring(queue)
  local bell = 'vf:bell:' .. queue
  if redis.call('LLEN', bell) == 0 then redis.call('RPUSH', bell, '1') end
end

local function count_waiting(queue, tokens, bytes, jobs)
  local load = 'vf:load:' .. queue
  redis.call('HINCRBY', load, 'tokens', tokens)
  redis.call('HINCRBY', load, 'bytes', bytes)
  redis.call('HINCRBY', load, 'jobs', jobs)
end

-- Put a job (back) into a queue, at the front or the back.
local function queue_job(id, queue, front)
  local key = 'rq:job:' .. id
  redis.call('HSET', key, 'status', 'queued', 'origin', queue, 'worker_name', '', 'started_at', '')
  local cost = redis.call('HGET', key, 'vf_cost')
  if cost then count_waiting(queue, cost, redis.call('HSTRLEN', key, 'data'), 1) end
  redis.call(front and 'LPUSH' or 'RPUSH', 'rq:queue:' .. queue, id)
  redis.call('SADD', 'rq:queues', 'rq:queue:' .. queue)
  ring(queue)
end

-- Put a job that was claimed back to the front of its queue, uncharged; false if there is none.
local function give_back(id, queue)
  local key = 'rq:job:' .. id
  if redis.call('EXISTS', key) == 0 then return false end
  redis.call('HDEL', key, 'vf_at')
  redis.call('HINCRBY', key, 'vf_attempts', -1)
  queue_job(id, queue, true)
  return true
end

-- A job begins anew: whatever it was suspected of is forgotten.
local function clear_suspicion(key)
  redis.call('HDEL', key, 'vf_at', 'vf_named', 'vf_condemned', 'vf_deaths')
  redis.call('HSET', key, 'vf_attempts', 0)
end

-- Hand an answer to a client, if it still lives.
local function answer(box, entry, ttl_s, most)
  if box == '' or redis.call('EXISTS', 'vf:alive:' .. box) == 0 then return end
  local list = 'vf:reply:' .. box
  if redis.call('LLEN', list) >= most then return end
  redis.call('RPUSH', list, entry)
  redis.call('EXPIRE', list, ttl_s)
end

local function forget(id)
  redis.call('DEL', 'rq:job:' .. id, 'rq:executions:' .. id)
end

-- Mark one block of a submission committed or refused. The bit is the truth: the counters move
-- only when it flips, so neither a redelivery nor a retry counts twice.
local function mark(sub, block, good, docs, rejected)
  if sub == '' then return end
  local key = 'vf:sub:' .. sub
  if redis.call('HGET', key, 'state') == false then return end
  local ok, bad = key .. ':ok', key .. ':bad'
  if good then
    if redis.call('SETBIT', ok, block, 1) == 1 then return end
    if redis.call('SETBIT', bad, block, 0) == 1 then
      redis.call('HINCRBY', key, 'failed_documents', -docs - rejected)
    end
    redis.call('HINCRBY', key, 'committed_documents', docs)
    redis.call('HINCRBY', key, 'failed_documents', rejected)
  else
    if redis.call('GETBIT', ok, block) == 1 or redis.call('SETBIT', bad, block, 1) == 1 then
      return
    end
    redis.call('HINCRBY', key, 'failed_documents', docs + rejected)
  end
  local ttl = redis.call('TTL', key)
  redis.call('EXPIRE', ok, ttl)
  redis.call('EXPIRE', bad, ttl)
  local state = redis.call('HMGET', key, 'state', 'blocks')
  if state[1] == 'closed'
    and redis.call('BITCOUNT', ok) + redis.call('BITCOUNT', bad) >= tonumber(state[2]) then
    redis.call('HSET', key, 'state', 'done', 'done_ms', text(now_ms))
  end
end

-- Keep word of refused documents with the submission; errors is a msgpack array of maps.
local function note_errors(sub, errors, most)
  if sub == '' or errors == '' then return end
  local list = 'vf:sub:' .. sub .. ':errors'
  for _, entry in ipairs(cmsgpack.unpack(errors)) do
    if redis.call('LLEN', list) >= most then break end
    redis.call('RPUSH', list, cmsgpack.pack(entry))
  end
  redis.call('EXPIRE', list, redis.call('TTL', 'vf:sub:' .. sub))
end

-- Move a job to the dead letter (RQ's failed registry), with its data, for people to look at.
-- reason is RQ's compressed text of the error, error the same as a msgpack map of ours.
local function bury(id, queue, worker, execution, reason, error, iso, ttl_s)
  local key, results, dead = 'rq:job:' .. id, 'rq:results:' .. id, 'rq:failed:' .. queue
  redis.call('HDEL', key, 'vf_at', 'vf_named', 'vf_condemned', 'vf_deaths')
  redis.call('HSET', key, 'status', 'failed', 'ended_at', iso, 'vf_died', text(now_ms),
    'vf_died_with', worker, 'vf_error', error)
  redis.call('EXPIRE', key, ttl_s)
  redis.call('ZREMRANGEBYSCORE', dead, '-inf', text(now_ms / 1000))
  redis.call('ZADD', dead, text(now_ms / 1000 + ttl_s), id)
  if reason ~= '' then
    redis.call('XADD', results, 'MAXLEN', '~', 10, '*', 'type', 2, 'worker_name', worker,
      'exc_string', reason, 'execution_id', execution)
    redis.call('EXPIRE', results, ttl_s)
  end
end

-- The uid of the collection whose merge queue this is; nil where it is none.
local function merges_into(queue)
  return string.match(queue or '', '%.merge%.(%x+)%-')
end

-- A document that its block went on without is in the index after all: counted once, as its job,
-- which is gone now, can be committed only once.
local function count_late(sub, docs)
  local key = 'vf:sub:' .. sub
  if redis.call('EXISTS', key) == 0 then return end
  redis.call('HINCRBY', key, 'failed_documents', -docs)
  redis.call('HINCRBY', key, 'committed_documents', docs)
end
