-- Settle claimed jobs: for each, the fence first, then what its outcome asks for.
--
-- KEYS  none of its own: as the ledger names them
-- ARGV  1 worker   2 time, ISO 8601   3 most replies   4 replies' TTL, s   5 dead letter's TTL, s
--       6 most errors kept with a submission
--       then for each job: id, execution, queue, outcome, box, reply, target, payload,
--       submission, block, documents, refused documents, errors for the submission (msgpack), the
--       refused documents (msgpack), its own error (msgpack)
--       Each document that is refused out of a block goes to the dead letter as a job of its own,
--       {id}-refused-{place}: place, tokens, data, RQ's compressed reason, error (msgpack)
-- Outcomes
--   answer   the job is deleted, its reply goes to the box
--   hand_on  the job moves to queue {target} with {payload} as its data
--   commit   the job is deleted, its block is marked committed, its reply goes to the box
--   fail     a stock job with retries left is queued again; else it goes to the dead letter,
--            {payload} is RQ's compressed reason; its block is marked refused, its reply goes to
--            the box
--   finish   a stock job's result ({payload}) is kept for {target} seconds where RQ looks for it
--   release  the job goes back to the front of its queue, and no attempt is charged
--   abandon  its lease runs out now: whoever rescues, judges it as if its worker had died
-- Returns 1 for each job that was settled, 0 for each that was no longer ours
local STRIDE, MOST_RETRIES = 15, 100
local worker, iso = ARGV[1], ARGV[2]
local most_replies, reply_ttl_s, dead_ttl_s, most_errors =
  tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6])

local function hand_on(id, queue, target, payload)
  local key = 'rq:job:' .. id
  redis.call('HSET', key, 'data', payload)
  clear_suspicion(key)
  queue_job(id, target, false)
end

local function has_retries(id)
  local key = 'rq:job:' .. id
  -- Anybody may have written it: 'inf' would be tried for ever.
  local given = redis.call('HGET', key, 'retries_left') or ''
  local left = string.match(given, '^%d+$') and math.min(tonumber(given), MOST_RETRIES) or 0
  if left <= 0 then return false end
  redis.call('HSET', key, 'retries_left', left - 1)
  clear_suspicion(key)
  return true
end

local function refuse(id, queue, execution, sub, apart)
  local job = redis.call('HMGET', 'rq:job:' .. id, 'vf_merge', 'vf_attempts', 'vf_version',
    'vf_deaths')
  local attempts = math.max(tonumber(job[2] or 1), tonumber(job[4] or 0))
  local uid, version = merges_into(job[1] or ''), tonumber(job[3] or 0)
  for _, entry in ipairs(cmsgpack.unpack(apart)) do
    local place, tokens, data, reason, error = unpack(entry)
    local own = id .. '-refused-' .. place
    -- Not of the submission any more: a retry must not count its block again (see count_late).
    redis.call('HSET', 'rq:job:' .. own, 'created_at', iso, 'enqueued_at', iso, 'origin', queue,
      'data', data, 'vf_from', sub ~= '' and sub or '.', 'vf_docs', 1, 'vf_merge', job[1] or '',
      'vf_cost', tokens, 'vf_attempts', attempts)
    if uid and version > 0 then
      -- Its version can still arrive: no tombstone above it may go.
      redis.call('HSET', 'rq:job:' .. own, 'vf_version', job[3])
      redis.call('ZADD', 'vf:outstanding:' .. uid, job[3], own)
    end
    bury(own, queue, worker, execution, reason, error, iso, dead_ttl_s)
  end
end

local function finish(id, queue, ttl_s, payload, execution)
  local key, results = 'rq:job:' .. id, 'rq:results:' .. id
  redis.call('HSET', key, 'status', 'finished', 'ended_at', iso, 'last_heartbeat', iso)
  redis.call('XADD', results, 'MAXLEN', '~', 10, '*', 'type', 1, 'worker_name', worker,
    'return_value', payload, 'execution_id', execution)
  if ttl_s == 0 then
    redis.call('DEL', key, results)
  elseif ttl_s > 0 then
    redis.call('EXPIRE', key, ttl_s)
    redis.call('EXPIRE', results, ttl_s)
    redis.call('ZADD', 'rq:finished:' .. queue, text(now_ms / 1000 + ttl_s), id)
  else
    redis.call('ZADD', 'rq:finished:' .. queue, '+inf', id)
  end
end

local settled = {}
for at = 7, #ARGV, STRIDE do
  local id, execution, queue, outcome = ARGV[at], ARGV[at + 1], ARGV[at + 2], ARGV[at + 3]
  local box, reply, target, payload = ARGV[at + 4], ARGV[at + 5], ARGV[at + 6], ARGV[at + 7]
  local sub, block = ARGV[at + 8], ARGV[at + 9]
  local docs, refused, errors = tonumber(ARGV[at + 10]), tonumber(ARGV[at + 11]), ARGV[at + 12]
  if outcome == 'abandon' then
    local member, lease = id .. ':' .. execution, 'vf:lease:' .. queue
    begin_to_write()
    settled[#settled + 1] = redis.call('ZADD', lease, 'XX', 'CH', 0, member)
    look_at(queue, 0)
  elseif not unlease(id, execution, queue) then
    settled[#settled + 1] = 0
  else
    note_errors(sub, errors, most_errors)
    if ARGV[at + 13] ~= '' then refuse(id, queue, execution, sub, ARGV[at + 13]) end
    if outcome == 'hand_on' then
      if refused > 0 then
        redis.call('HSET', 'rq:job:' .. id, 'vf_docs', docs, 'vf_refused', refused)
      end
      hand_on(id, queue, target, payload)
    elseif outcome == 'release' then
      give_back(id, queue)
    else
      if reply ~= '' then answer(box, id, reply, reply_ttl_s, most_replies) end
      if outcome == 'fail' and has_retries(id) then
        queue_job(id, queue, false)
      elseif outcome == 'fail' then
        bury(id, queue, worker, execution, payload, ARGV[at + 14], iso, dead_ttl_s)
        mark(sub, block, false, docs, refused)
      elseif outcome == 'finish' then
        finish(id, queue, tonumber(target), payload, execution)
      else
        local late = outcome == 'commit' and sub == ''
        local from = late and redis.call('HGET', 'rq:job:' .. id, 'vf_from')
        forget(id)
        if outcome == 'commit' then
          mark(sub, block, true, docs, refused)
          if from then count_late(from, docs) end
          local uid = merges_into(queue)
          if uid then redis.call('ZREM', 'vf:outstanding:' .. uid, id) end
        end
      end
    end
    settled[#settled + 1] = 1
  end
end
return settled
