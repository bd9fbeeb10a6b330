-- What the worker's scripts share; put before each of them.
--
-- Keys named after a job's id, an execution's id and a queue's name:
--   rq:job:{id} hash           rq:queue:{queue} list      rq:wip:{queue} zset
--   rq:execution:{id}:{exec}   rq:executions:{id} zset    rq:failed:{queue} zset
--   rq:results:{id} stream     rq:queues set              vf:lease:{queue} zset
--   vf:load:{queue} hash       vf:bell:{line} list        vf:alive:{box} string
--   vf:sum:{line} hash         vf:line:{line} zset        vf:clock:{line} zset
--   vf:outstanding:{uid} zset  vf:parked:{queue} list     vf:poison:{pool} zset
--   vf:reply:{box} list        vf:sub:{sub} hash, with :ok and :bad bitmaps and :errors list
--   vf:subs:{tenant} zset      vf:dead hash, vf:dead:hours hash, vf:dead:due zset
--   vf:busy:{line} zset
--
-- A full Redis refuses a script whose first write may need memory. So each script's first write is
-- one that is never refused (ZREM, LPOP, EXPIRE, DEL); after it, Redis lets the rest pass.
--
-- The queues of all tenants for one work stand in a line, and are served by turns: vf:line has those
-- in which something waits, scored by the tokens that the line had served when their turn comes. A
-- queue that runs empty leaves the line, and vf:clock keeps its place while that is ahead of the
-- others: coming back does not make its turn come sooner. Merge queues stand in no line.
local time = redis.call('TIME')
local now_us = time[1] * 1000000 + time[2]
local now_ms = now_us / 1000

-- Adding 0 makes 0 of -0, which Redis takes for no number.
local function text(number) return string.format('%.0f', number + 0) end

-- Take the lease away. True for the one who may settle: this is the fence.
local function unlease(id, execution, queue)
  local member = id .. ':' .. execution
  local held = redis.call('ZREM', 'vf:lease:' .. queue, member) == 1
  redis.call('ZREM', 'rq:wip:' .. queue, member)
  redis.call('DEL', 'rq:execution:' .. member)
  redis.call('ZREM', 'rq:executions:' .. id, execution)
  return held
end

-- A write that is never refused, for where the next one would be: the key never is.
local function begin_to_write() redis.call('DEL', 'vf:never') end

-- The line of a queue: its name without `vf.{tenant}.`
local function line_of(queue) return string.match(queue, '^vf%.[^.]*%.(.+)$') or queue end

local function is_merge(line) return string.sub(line, 1, 6) == 'merge.' end

local function sum_of(queue)
  local line = line_of(queue)
  return 'vf:sum:' .. (is_merge(line) and 'merge' or line)
end

local function ring(queue)
  local bell = 'vf:bell:' .. line_of(queue)
  if redis.call('LLEN', bell) == 0 then redis.call('RPUSH', bell, '1') end
end

local function add(key, prefix, tokens, bytes, jobs)
  -- Adding 0 makes 0 of -0, which HINCRBY takes for no number.
  redis.call('HINCRBY', key, prefix .. 'tokens', tokens + 0)
  redis.call('HINCRBY', key, prefix .. 'bytes', bytes + 0)
  return redis.call('HINCRBY', key, prefix .. 'jobs', jobs + 0)
end

-- What Redis pays for a job beside its data; the same wherever jobs are counted.
local JOB_BYTES = 1500
local function bytes_of(key) return redis.call('HSTRLEN', key, 'data') + JOB_BYTES end

-- What waits for all tenants together; it starts anew when nothing does.
local function count_all(queue, tokens, bytes, jobs)
  local sum = sum_of(queue)
  if add(sum, '', tokens, bytes, jobs) <= 0 then redis.call('DEL', sum) end
end

local function count_waiting(queue, tokens, bytes, jobs)
  add('vf:load:' .. queue, '', tokens, bytes, jobs)
  count_all(queue, tokens, bytes, jobs)
end

-- Jobs leave a queue's list. What stock tools put there was not counted: no more is taken from the
-- sums than the queue has in them.
local function count_out(queue, tokens, bytes, jobs)
  local load = 'vf:load:' .. queue
  local held = redis.call('HMGET', load, 'tokens', 'bytes', 'jobs')
  local function held_of(f) return math.max(0, tonumber(held[f] or 0)) end
  local is_last = jobs >= held_of(3)
  tokens = is_last and held_of(1) or math.min(tokens, held_of(1))
  bytes = is_last and held_of(2) or math.min(bytes, held_of(2))
  jobs = is_last and held_of(3) or jobs
  add(load, '', -tokens, -bytes, -jobs)
  count_all(queue, -tokens, -bytes, -jobs)
end

-- Whether something waits in a queue; anybody may have made something else than a list of it.
local function is_filled(queue)
  local length = redis.pcall('LLEN', 'rq:queue:' .. queue)
  return type(length) == 'number' and length > 0
end

local function join_line(queue)
  local line = line_of(queue)
  local places = 'vf:line:' .. line
  if is_merge(line) or redis.call('ZSCORE', places, queue) then return false end
  local now = tonumber(redis.call('ZRANGE', places, 0, 0, 'WITHSCORES')[2] or 0)
  local served = tonumber(redis.call('ZSCORE', 'vf:clock:' .. line, queue) or 0)
  begin_to_write()
  redis.call('ZADD', places, text(math.max(now, served)), queue)
  return true
end

-- A queue has run empty. Its sums start anew, whatever stock tools took out of its list.
local function leave_line(queue)
  local line, load = line_of(queue), 'vf:load:' .. queue
  local left = redis.call('HMGET', load, 'tokens', 'bytes', 'jobs', 'parked_jobs')
  if tonumber(left[4] or 0) > 0 then
    redis.call('HDEL', load, 'tokens', 'bytes', 'jobs')
  else
    redis.call('DEL', load)
  end
  if left[3] then
    count_all(queue, -tonumber(left[1] or 0), -tonumber(left[2] or 0), -tonumber(left[3]))
  end
  if is_merge(line) then return end
  local places, clock = 'vf:line:' .. line, 'vf:clock:' .. line
  local place = redis.call('ZSCORE', places, queue)
  if not place then return end
  redis.call('ZREM', places, queue)
  local now = redis.call('ZRANGE', places, 0, 0, 'WITHSCORES')[2]
  if not now then
    redis.call('DEL', clock)
  else
    redis.call('ZREMRANGEBYSCORE', clock, '-inf', now)
    if tonumber(place) > tonumber(now) then redis.call('ZADD', clock, place, queue) end
  end
end

-- A lease of the queue may be over at {until_ms}: rescue.lua looks at it then, and at no other queue.
local function look_at(queue, until_ms)
  local line = line_of(queue)
  if not is_merge(line) then redis.call('ZADD', 'vf:busy:' .. line, 'LT', text(until_ms), queue) end
end

-- Put a job (back) into a queue, at the front or the back.
local function queue_job(id, queue, front)
  local key = 'rq:job:' .. id
  redis.call('HSET', key, 'status', 'queued', 'origin', queue, 'worker_name', '', 'started_at', '')
  local cost = redis.call('HGET', key, 'vf_cost')
  if cost then count_waiting(queue, cost, bytes_of(key), 1) end
  redis.call(front and 'LPUSH' or 'RPUSH', 'rq:queue:' .. queue, id)
  redis.call('SADD', 'rq:queues', 'rq:queue:' .. queue)
  join_line(queue)
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

-- Texts of which workers have died lately: named at first, condemned when it happened again.
local function poison_of(queue)
  return 'vf:poison:' .. (string.match(queue, '^vf%.[^.]*%.(.+)%.%a+$') or queue)
end

local function is_known(queue, member)
  return tonumber(redis.call('ZSCORE', poison_of(queue), member) or 0) > now_ms
end

-- A text has run well: if it was named, its next death is as its first (rescue.lua).
local function acquit(known, digest, ms)
  if redis.call('ZREM', known, 'named:' .. digest) == 1 then
    redis.call('ZADD', known, text(now_ms + ms), 'cleared:' .. digest)
  end
end

-- A job begins anew: whatever it was suspected of is forgotten.
local function clear_suspicion(key)
  redis.call('HDEL', key, 'vf_at', 'vf_text', 'vf_named', 'vf_condemned', 'vf_deaths')
  redis.call('HSET', key, 'vf_attempts', 0)
end

-- Whether a box in which {count} answers wait has room for one of {size} bytes. How many bytes wait is
-- reckoned from what was put in: of those that were read since, each had the mean of all. The oldest
-- are read first, so there are never more than twice as many.
local MOST_REPLY_BYTES = 2 ^ 28
local function has_room(box, count, size, ttl_s)
  local key = 'vf:reply_size:' .. box
  local told = redis.pcall('HMGET', key, 'bytes', 'count')
  if told.err then return false end
  local bytes, before = tonumber(told[1] or 0) or 0, tonumber(told[2] or 0) or 0
  if before > count then bytes = math.floor(bytes * count / before) end
  local fits = bytes + size <= MOST_REPLY_BYTES
  if fits then bytes = bytes + size end
  redis.call('HSET', key, 'bytes', text(bytes), 'count', count + 1)
  redis.call('EXPIRE', key, ttl_s)
  return fits
end

-- Hand a job's answer to a client, if it still lives. One that does not read what is in its box
-- already gets an error in place of what the box has no room for.
local function answer(box, id, entry, ttl_s, most)
  if box == '' or redis.call('EXISTS', 'vf:alive:' .. box) == 0 then return end
  local list = 'vf:reply:' .. box
  local count = redis.pcall('LLEN', list)
  if type(count) ~= 'number' or count >= most then return end  -- its owner made something else of it
  if count > 0 and not has_room(box, count, #entry, ttl_s) then
    entry = cmsgpack.pack({id, 'error', {
      code = 'unavailable', message = 'the client reads its answers too slowly',
    }})
  end
  redis.call('RPUSH', list, entry)
  redis.call('EXPIRE', list, ttl_s)
end

local function forget(id)
  redis.call('DEL', 'rq:job:' .. id, 'rq:executions:' .. id)
end

-- A submission is done. How long it can still be asked for goes by how many its tenant has: one that
-- nobody asks for by a name is forgotten soon, a named one only where there are very many.
local DAY_S, HOUR_S, MINUTES_S, MANY, VERY_MANY = 86400, 3600, 300, 20000, 100000
local function end_submission(sub)
  local key = 'vf:sub:' .. sub
  redis.call('HSET', key, 'state', 'done', 'done_ms', text(now_ms))
  local found = redis.call('HMGET', key, 'once', 'tenant')
  local all = 'vf:subs:' .. (found[2] or '-')
  local count, ttl_s = redis.call('ZCARD', all), nil
  if found[1] then
    ttl_s = count > MANY and MINUTES_S or DAY_S
  elseif count > MANY then
    ttl_s = count > VERY_MANY and HOUR_S or DAY_S
  end
  if not ttl_s then return end
  for _, part in ipairs({'', ':ok', ':bad', ':errors'}) do
    redis.call('EXPIRE', key .. part, ttl_s)
  end
  redis.call('ZADD', all, 'XX', text(now_ms / 1000 + ttl_s), sub)
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
      redis.call('HINCRBY', key, 'failed_documents', text(-docs - rejected))
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
    end_submission(sub)
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

-- What the dead letter holds is counted by tenant, '*' for all, and by the hour in which it is over;
-- an entry's vf_kept says in which hour it is counted, and with how many bytes.
local DEAD_BYTES = 2200
local function add_dead(tenant, bytes)
  for _, name in ipairs({tenant, '*'}) do
    if redis.call('HINCRBY', 'vf:dead', name, bytes) <= 0 then redis.call('HDEL', 'vf:dead', name) end
  end
end

local function tenant_of(queue) return string.match(queue, '^vf%.([^.]*)%.') or '-' end

local function uncount_dead(key, queue)
  local kept = redis.call('HGET', key, 'vf_kept')
  if not kept then return end
  redis.call('HDEL', key, 'vf_kept')
  local hour, bytes = string.match(kept, '^(%d+) (%d+)$')
  local tenant = tenant_of(queue)
  local counted = hour and tonumber(redis.call('HGET', 'vf:dead:hours', hour .. ':' .. tenant) or 0)
  if not counted or counted == 0 then return end
  bytes = math.min(tonumber(bytes), counted)
  redis.call('HINCRBY', 'vf:dead:hours', hour .. ':' .. tenant, text(-bytes))
  add_dead(tenant, text(-bytes))
end

local function count_dead(key, queue, ttl_s)
  uncount_dead(key, queue)  -- stock tools may have taken it out and not counted
  local bytes = redis.call('HSTRLEN', key, 'data') + DEAD_BYTES
  local hour = text(math.ceil((now_ms / 1000 + ttl_s) / HOUR_S))
  local tenant = tenant_of(queue)
  redis.call('HSET', key, 'vf_kept', hour .. ' ' .. bytes)
  redis.call('HINCRBY', 'vf:dead:hours', hour .. ':' .. tenant, bytes)
  redis.call('ZADD', 'vf:dead:due', hour, hour .. ':' .. tenant)
  add_dead(tenant, bytes)
end

-- Move a job to the dead letter (RQ's failed registry), with its data, for people to look at.
-- reason is RQ's compressed text of the error, error the same as a msgpack map of ours.
-- Scores, in microseconds, are all different: pages go on where the last one ended by its score, and
-- would read anew each time what has the same one.
local dying_us = now_us
local function bury(id, queue, worker, execution, reason, error, iso, ttl_s)
  local key, results, dead = 'rq:job:' .. id, 'rq:results:' .. id, 'rq:failed:' .. queue
  redis.call('HDEL', key, 'vf_at', 'vf_text', 'vf_named', 'vf_condemned', 'vf_deaths')
  redis.call('HSET', key, 'status', 'failed', 'ended_at', iso, 'vf_died', text(now_ms),
    'vf_died_with', worker, 'vf_error', error)
  count_dead(key, queue, ttl_s)
  redis.call('EXPIRE', key, ttl_s)
  redis.call('ZADD', dead, string.format('%.6f', dying_us / 1000000 + ttl_s), id)
  dying_us = dying_us + 1
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
  redis.call('HINCRBY', key, 'failed_documents', text(-docs))
  redis.call('HINCRBY', key, 'committed_documents', docs)
end
