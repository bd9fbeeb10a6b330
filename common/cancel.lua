-- Cancel jobs, wherever they are. What waits is forgotten, what runs loses its lease, so that its
-- worker's next heartbeat learns of it and its settlement is refused.
--
-- KEYS  rq:job:{id} hash, one for each job
-- also  rq:executions:{id} zset, rq:execution:{id}:{execution} hash, vf:lease:{queue} zset,
--       rq:wip:{queue} zset, vf:load:{queue} hash: named after the job's id and origin
-- Returns the number of jobs that were there
local cancelled = 0
for _, key in ipairs(KEYS) do
  local job = redis.call('HMGET', key, 'status', 'origin', 'vf_cost')
  local status, queue, cost = job[1], job[2], tonumber(job[3] or 0)
  if status == 'queued' then
    local size = redis.call('HSTRLEN', key, 'data')
    redis.call('DEL', key)
    if redis.call('EXISTS', 'vf:load:' .. queue) == 1 then
      redis.call('HINCRBY', 'vf:load:' .. queue, 'tokens', -cost)
      redis.call('HINCRBY', 'vf:load:' .. queue, 'bytes', -size)
      redis.call('HINCRBY', 'vf:load:' .. queue, 'jobs', -1)
    end
    cancelled = cancelled + 1
  elseif status == 'started' then
    local id = string.sub(key, #'rq:job:' + 1)
    redis.call('DEL', key)
    for _, execution in ipairs(redis.call('ZRANGE', 'rq:executions:' .. id, 0, -1)) do
      local member = id .. ':' .. execution
      redis.call('ZREM', 'vf:lease:' .. queue, member)
      redis.call('ZREM', 'rq:wip:' .. queue, member)
      redis.call('DEL', 'rq:execution:' .. member)
    end
    redis.call('DEL', 'rq:executions:' .. id)
    cancelled = cancelled + 1
  end
end
return cancelled
