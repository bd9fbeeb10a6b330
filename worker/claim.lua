-- Claim jobs from several queues, the first ones first.
--
-- KEYS  rq:queue:{queue} list, one a queue; the rest as the ledger names them
-- ARGV  1 worker   2 time, ISO 8601   3 lease, ms   4 prefix of the execution ids
--       then for each queue: its name, most jobs, most tokens, '1' if the worker has nothing of
--       its lane in flight
-- A job whose worker died is a suspect: it is claimed alone, by a worker that has nothing else of
-- its lane in flight, so that if it kills again it takes no neighbours with it. vf_at says what of
-- it is being worked on, '*' for the whole job; worker/quarantine.py goes on from there.
-- Returns {1 if a suspect waits until nothing is in flight, jobs}, one array a job: id, execution, number of its queue, this claim's time in us, its data,
--       then the values of the fields in FIELDS. A job without vf_cost was enqueued by a stock RQ
--       Queue. Data of more than LARGE bytes is left out, for the caller to fetch: Redis hashes
--       every string that a script touches, byte by byte.
local LARGE = 16384
local FIELDS = {
  'vf_cost', 'vf_enqueued', 'vf_box', 'vf_sub', 'vf_block', 'vf_docs', 'vf_merge',
  'vf_version', 'vf_attempts', 'vf_refused', 'timeout', 'result_ttl', 'vf_named', 'vf_condemned',
  'vf_from',
}
local COST, SUB, ATTEMPTS, STATUS, DEADLINE = 1, 4, 9, #FIELDS + 1, #FIELDS + 2
local worker, iso, lease_ms, prefix = ARGV[1], ARGV[2], tonumber(ARGV[3]), ARGV[4]
local ask = {unpack(FIELDS)}
ask[STATUS], ask[DEADLINE] = 'status', 'vf_deadline'

-- Jobs whose text, client or submission is gone are dropped here, and never reach an engine.
local function is_gone(job, size)
  local deadline, sub = job[DEADLINE], job[SUB]
  if size == 0 or job[STATUS] == 'canceled' then return true end
  if deadline and tonumber(deadline) < now_ms then return true end
  return sub and redis.call('HGET', 'vf:sub:' .. sub, 'state') == 'cancelled'
end

local function take(id, queue, job, number)
  local execution = prefix .. number
  local member, key, ttl_s = id .. ':' .. execution, 'rq:job:' .. id, math.ceil(lease_ms / 1000)
  local seconds = text(now_ms / 1000)
  redis.call('ZADD', 'vf:lease:' .. queue, text(now_ms + lease_ms), member)
  redis.call('ZADD', 'rq:wip:' .. queue, '+inf', member)
  redis.call('HSET', 'rq:execution:' .. member, 'id', execution, 'created_at', seconds,
    'last_heartbeat', seconds, 'worker_name', worker)
  redis.call('EXPIRE', 'rq:execution:' .. member, ttl_s)
  redis.call('ZADD', 'rq:executions:' .. id, text(now_ms / 1000 + ttl_s + 60), execution)
  redis.call('EXPIRE', 'rq:executions:' .. id, ttl_s + 60)
  redis.call('HSET', key, 'status', 'started', 'started_at', iso, 'last_heartbeat', iso,
    'worker_name', worker, 'vf_attempts', tonumber(job[ATTEMPTS] or 0) + 1)
  if tonumber(job[ATTEMPTS] or 0) > 0 then redis.call('HSET', key, 'vf_at', '*') end
  redis.call('PERSIST', key)
  return execution
end

-- A suspect at the head of any queue goes first, once there is nothing else in flight.
local first, last = 1, #KEYS
for k, list in ipairs(KEYS) do
  local id = ARGV[4 + 4 * k] == '1' and redis.call('LINDEX', list, 0)
  if id and tonumber(redis.call('HGET', 'rq:job:' .. id, 'vf_attempts') or 0) > 0 then
    first, last = k, k
    break
  end
end

local claimed, is_quarantined, waits_for_calm = {}, false, 0
for k = first, last do
  local list = KEYS[k]
  local at = 1 + 4 * k
  local queue, most_jobs, most_tokens = ARGV[at], tonumber(ARGV[at + 1]), tonumber(ARGV[at + 2])
  local is_alone = ARGV[at + 3] == '1'
  local jobs, tokens, left, left_tokens, left_bytes = 0, 0, 0, 0, 0
  while jobs < most_jobs do
    local id = redis.call('LINDEX', list, 0)
    if not id then break end
    local key = 'rq:job:' .. id
    local job, size = redis.call('HMGET', key, unpack(ask)), redis.call('HSTRLEN', key, 'data')
    local cost = tonumber(job[COST] or 0)
    local gone = is_gone(job, size)
    local is_suspect = tonumber(job[ATTEMPTS] or 0) > 0
    if not gone and tokens > 0 and tokens + cost > most_tokens then break end
    if not gone and is_suspect and (#claimed > 0 or not is_alone) then
      waits_for_calm = 1
      break
    end
    redis.call('LPOP', list)
    if job[COST] then
      left, left_tokens, left_bytes = left + 1, left_tokens + cost, left_bytes + size
    end
    if gone then
      redis.call('DEL', key)
    else
      jobs, tokens = jobs + 1, tokens + cost
      local execution = take(id, queue, job, #claimed + 1)
      local row = {id, execution, k, now_us, size <= LARGE and redis.call('HGET', key, 'data')}
      for f = 1, #FIELDS do row[#row + 1] = job[f] end
      claimed[#claimed + 1] = row
      if is_suspect then most_jobs, is_quarantined = jobs, true end
    end
  end
  local load = 'vf:load:' .. queue
  if redis.call('LLEN', list) == 0 then
    redis.call('DEL', load)  -- the sums start anew, whatever stock tools took out of the list
  elseif left > 0 then
    count_waiting(queue, -left_tokens, -left_bytes, -left)
  end
  if jobs > 0 and redis.call('LLEN', list) > 0 then ring(queue) end
  if is_quarantined then break end
end
return {waits_for_calm, claimed}
