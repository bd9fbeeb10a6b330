-- Cancel jobs, wherever they are. What waits is forgotten, what runs loses its lease, so that its
-- worker's next heartbeat learns of it and its settlement is refused.
--
-- But a job that somebody waited for and that an engine may have is only left alone (vf_left), with
-- its lease: its worker may be dead already, or die of it yet, and a job that nobody remembers would
-- kill again each time that it is asked for. worker/heartbeat.lua tells a worker that lives.
--
-- KEYS  rq:job:{id} hash, one for each job
-- also  rq:executions:{id} zset, rq:execution:{id}:{execution} hash, vf:lease:{queue} zset,
--       rq:wip:{queue} zset, vf:load:{queue} hash, vf:sum:{line} hash: named after the job's id and
--       origin; the load of its merge queue, where it was parked for that
-- Returns the number of jobs that were there
local JOB_BYTES = 1500  -- as in enqueue.lua

-- A job waits no more. One that stock tools put there was not counted: no more is taken from the sums
-- than the queue has in them.
local function count_out(load, prefix, sum, tokens, bytes)
  local function held_of(field)
    return math.max(0, tonumber(redis.call('HGET', load, prefix .. field) or 0))
  end
  local is_last = held_of('jobs') <= 1
  for field, number in pairs({tokens = tokens, bytes = bytes, jobs = 1}) do
    local held = held_of(field)
    local out = is_last and held or math.min(number, held)
    if out > 0 then
      redis.call('HINCRBY', load, prefix .. field, -out)
      redis.call('HINCRBY', sum, field, -out)
    end
  end
end

-- What waited the longest is cancelled first, so its id stands at the head. Where nobody claims, ids
-- would pile up there. One stays, for a claim to come to, which then takes the queue out of its line.
local MOST_IDS = 8
local function drop_gone(list)
  for _ = 1, MOST_IDS do
    local first = redis.call('LRANGE', list, 0, 1)
    if #first < 2 or redis.call('EXISTS', 'rq:job:' .. first[1]) == 1 then return end
    redis.call('LPOP', list)
  end
end

local cancelled = 0
for _, key in ipairs(KEYS) do
  local job = redis.call('HMGET', key, 'status', 'origin', 'vf_cost', 'vf_parked', 'vf_merge',
    'vf_box', 'vf_attempts', 'vf_left')
  local status, queue = job[1], job[2] or ''
  local cost = math.floor(math.abs(tonumber(job[3] or 0) or 0))
  local is_suspect = (tonumber(job[7] or 0) or 0) > 0  -- of what runs: this claim is counted
  if (job[6] or job[8]) and is_suspect and (status == 'queued' or status == 'started') then
    redis.call('HDEL', key, 'vf_box', 'vf_deadline')
    redis.call('HSET', key, 'vf_left', 1)
    cancelled = cancelled + 1
  elseif status == 'queued' then
    local size = redis.call('HSTRLEN', key, 'data') + JOB_BYTES
    local line = string.match(queue, '^vf%.[^.]*%.(.+)$') or queue
    local sum = 'vf:sum:' .. (string.sub(line, 1, 6) == 'merge.' and 'merge' or line)
    redis.call('DEL', key)
    if job[3] then
      local load = 'vf:load:' .. (job[4] and job[5] or queue)
      count_out(load, job[4] and 'parked_' or '', sum, cost, size)
    end
    drop_gone('rq:queue:' .. queue)
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
