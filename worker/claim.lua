-- Claim jobs from several queues, the first ones first; those in one line by turns.
--
-- KEYS  rq:queue:{queue} list, or vf:line:{line} zset, one for each that is asked; the rest as the
--       ledger names them
-- ARGV  1 worker   2 time, ISO 8601   3 lease, ms   4 prefix of the execution ids
--       5 most bytes waiting in a merge queue   6 the same in all of them; 0 for no limit
--       then for each that is asked: its name, `vf.*.{line}` for the queues of all tenants; most
--       jobs, most tokens, most bytes of all that is claimed so far in this call, '1' if the worker has nothing of its lane in flight
-- A job whose worker died is a suspect: it is claimed alone, by a worker that has nothing else of
-- its lane in flight, so that if it kills again it takes no neighbours with it. vf_at says what of
-- it is being worked on, '*' for the whole job; worker/quarantine.py goes on from there.
-- A job whose shard would go into a merge queue that is full is parked, out of the others' way,
-- until whoever claims from that merge queue has made room.
-- Returns {1 if a suspect waits until nothing is in flight, jobs, what was dropped as no job}
--       one array a job: id, execution, its queue, this claim's time in us, its data, then the values
--       of the fields in FIELDS. A job without vf_cost was enqueued by a stock RQ Queue. Data of more
--       than LARGE bytes is left out, for the caller to fetch: Redis hashes every string that a
--       script touches, byte by byte.
--       What was dropped: queue, count and so on. Jobs that were cancelled are not among it.
local MOST_QUEUES = 32  -- of one line; they change with each turn
local MOST_DROPPED = 1024  -- jobs that are gone or parked, in one call
local MOST_UNPARKED = 64
local LARGE = 16384
local FIELDS = {
  'vf_cost', 'vf_enqueued', 'vf_box', 'vf_sub', 'vf_block', 'vf_docs', 'vf_merge',
  'vf_version', 'vf_attempts', 'vf_refused', 'timeout', 'result_ttl', 'vf_named', 'vf_condemned',
  'vf_from', 'vf_left',
}
local COST, SUB, MERGE, ATTEMPTS, STATUS, DEADLINE = 1, 4, 7, 9, #FIELDS + 1, #FIELDS + 2
local BLOCK, ORIGIN, LEFT, DEATHS, AT = 5, #FIELDS + 3, 16, #FIELDS + 4, #FIELDS + 5
local MOST_BLOCKS = 2 ^ 24  -- as enqueue.lua has it
local ASKED = 6
local worker, iso, lease_ms, prefix = ARGV[1], ARGV[2], tonumber(ARGV[3]), ARGV[4]
local most_unmerged, most_all_unmerged = tonumber(ARGV[5]), tonumber(ARGV[6])
local ask_for = {unpack(FIELDS)}
ask_for[STATUS], ask_for[DEADLINE], ask_for[ORIGIN] = 'status', 'vf_deadline', 'origin'
ask_for[DEATHS], ask_for[AT] = 'vf_deaths', 'vf_at'

-- What the fields of a job must look like. Anybody may have written them: a field that does not is
-- taken away before any script counts with it, for a script that fails at the head of a queue would
-- hold up all behind it.
local MOST_CHARACTERS, NAME = 256, '^[%w_.-]+$'
local COUNT, LARGE_COUNT, NAMED = {'^%d+$', 10}, {'^%d+$', 16}, {NAME, MOST_CHARACTERS}
local LOOKS = {  -- a pattern, and the most characters
  [COST] = COUNT, [2] = LARGE_COUNT, [3] = NAMED, [SUB] = NAMED, [BLOCK] = COUNT, [6] = COUNT,
  [MERGE] = {'^vf%.[%w_-]+%.merge%.[%w_-]+%.bulk$', MOST_CHARACTERS}, [8] = LARGE_COUNT,
  [ATTEMPTS] = COUNT, [10] = COUNT, [13] = COUNT, [14] = {'^[%d,]+$', MOST_CHARACTERS},
  [15] = NAMED, [LEFT] = COUNT, [DEADLINE] = LARGE_COUNT, [DEATHS] = COUNT,
}

-- Take what looks wrong out of job; returns the fields' names.
local function wrong_fields(job)
  local wrong = {}
  for f, look in pairs(LOOKS) do
    local value = job[f]
    if value and (#value > look[2] or not string.match(value, look[1])) then
      job[f], wrong[#wrong + 1] = false, ask_for[f]
    end
  end
  if job[AT] then wrong[#wrong + 1] = ask_for[AT] end  -- what waits is nowhere
  if job[SUB] and tonumber(job[BLOCK] or MOST_BLOCKS) >= MOST_BLOCKS then
    -- A block of no number is none of the submission's.
    job[SUB], wrong[#wrong + 1] = false, ask_for[SUB]
  end
  return wrong
end

-- Jobs whose text, client or submission is gone are dropped here, and never reach an engine. Of a
-- suspect the client may be gone: it runs to its verdict, for what kills must be remembered.
local function is_gone(job, size)
  local deadline, sub = job[DEADLINE], job[SUB]
  if size == 0 or job[STATUS] == 'canceled' then return true end
  local is_late = deadline and tonumber(deadline) < now_ms
  if (is_late or job[LEFT]) and tonumber(job[ATTEMPTS] or 0) <= 0 then return true end
  return sub and redis.call('HGET', 'vf:sub:' .. sub, 'state') == 'cancelled'
end

-- An id that stayed behind, as of a job that was cancelled and enqueued again: the job runs, is in the
-- dead letter, or waits in another queue. Taken once more, it would be in two places.
local function is_left_over(job, queue)
  local status = job[STATUS]
  return status == 'started' or status == 'failed' or job[ORIGIN] and job[ORIGIN] ~= queue
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
  if tonumber(job[ATTEMPTS] or 0) > 0 then
    redis.call('HSET', key, 'vf_at', '*')
    uncount_dead(key, queue)  -- RQ's own tools may have taken it out of the dead letter
  end
  redis.call('PERSIST', key)
  return execution
end

-- Whether a merge queue holds more than a share of its bounds: its own, and what all leave.
local function holds_more(merge, share)
  local bytes = tonumber(redis.call('HGET', 'vf:load:' .. merge, 'bytes') or 0)
  local all = tonumber(redis.call('HGET', 'vf:sum:merge', 'bytes') or 0)
  return most_unmerged > 0 and bytes > share * most_unmerged
    or most_all_unmerged > 0 and bytes > share * math.max(0, most_all_unmerged - all)
end

-- Whether no more shards should come into a merge queue for now; one that is empty takes some always.
local full = {}
local function is_full(merge)
  if full[merge] == nil then full[merge] = holds_more(merge, 1) end
  return full[merge]
end

-- A parked job counts with its merge queue, which its collection's enqueues look at, and no more
-- with its own queue, which it would fill for the tenant's other collections.
local function park(id, queue, merge, cost, size)
  redis.call('RPUSH', 'vf:parked:' .. merge, id)
  redis.call('HSET', 'rq:job:' .. id, 'vf_parked', 1, 'origin', queue)  -- back to where it was
  add('vf:load:' .. merge, 'parked_', cost, size, 1)
end

local function unpark(merge)
  local parked, back = 'vf:parked:' .. merge, {}
  for _ = 1, MOST_UNPARKED do
    local id = redis.call('LPOP', parked)
    if not id then break end
    back[#back + 1] = id
  end
  for at = #back, 1, -1 do
    local key = 'rq:job:' .. back[at]
    local job = redis.call('HMGET', key, 'vf_parked', 'origin', 'vf_cost')
    if job[1] then  -- else it was cancelled
      local cost, size = tonumber(job[3] or 0), bytes_of(key)
      redis.call('HDEL', key, 'vf_parked')
      add('vf:load:' .. merge, 'parked_', -cost, -size, -1)
      add('vf:load:' .. job[2], '', cost, size, 1)
      redis.call('LPUSH', 'rq:queue:' .. job[2], back[at])
      -- Empty as it was, it may have been forgotten (sweep.lua).
      redis.call('SADD', 'rq:queues', 'rq:queue:' .. job[2])
      join_line(job[2])
      ring(job[2])
    end
  end
  if redis.call('EXISTS', parked) == 0 then
    redis.call('HDEL', 'vf:load:' .. merge, 'parked_tokens', 'parked_bytes', 'parked_jobs')
  end
end

local function unpark_if_there_is_room(queue)
  if not is_merge(line_of(queue)) then return end
  if redis.call('EXISTS', 'vf:parked:' .. queue) == 0 then return end
  if not holds_more(queue, 0.5) then unpark(queue) end
end

-- Whether a queue belongs into a line. Anybody may have put it there: one of another line would never
-- leave this one, and a name of other characters is none that a worker could settle.
local function is_of_line(queue, line)
  return #queue <= MOST_CHARACTERS and string.match(queue, '^vf%.[%w_-]+%.(.+)$') == line
end

-- The queues that are asked: each with the number of the ask, its list, and its place in its line.
local function find_queues()
  local found = {}
  local function note(queue, k, place)
    found[#found + 1] = {queue = queue, k = k, list = 'rq:queue:' .. queue, place = tonumber(place)}
  end
  for k = 1, #KEYS do
    local name = ARGV[ASKED - 4 + 5 * k]
    if string.sub(name, 1, 5) ~= 'vf.*.' then
      note(name, k)
    else
      -- What stock tools put into the default tenant's queue did not join the line.
      local work = string.sub(name, 6)
      local default = 'vf.-.' .. work
      if is_filled(default) then join_line(default) end
      local line = redis.call('ZRANGE', KEYS[k], 0, MOST_QUEUES - 1, 'WITHSCORES')
      for at = 1, #line, 2 do
        local queue = line[at]
        if is_of_line(queue, work) then
          note(queue, k, line[at + 1])
        else
          redis.call('ZREM', KEYS[k], queue)
          ring(name)  -- for those behind it
        end
      end
    end
  end
  return found
end

local claimed, is_quarantined, waits_for_calm, dropped, no_jobs = {}, false, 0, 0, {}
local all_tokens, all_bytes = 0, 0

-- Take the job at the head of a queue, when its ask has room for it.
-- Returns its tokens; 0 when it was dropped; nil, and whether only this queue is done with.
local function take_first(entry, ask)
  local id = redis.call('LINDEX', entry.list, 0)
  if not id then return nil, true end
  local key = 'rq:job:' .. id
  local job = redis.pcall('HMGET', key, unpack(ask_for))
  -- What is no hash is no job, and an id of other characters none that anybody could settle.
  local is_no_job = job.err or #id > MOST_CHARACTERS or not string.match(id, NAME)
  if is_no_job or is_left_over(job, entry.queue) then
    redis.call('LPOP', entry.list)
    entry.is_touched, dropped = true, dropped + 1
    if is_no_job then entry.no_jobs = (entry.no_jobs or 0) + 1 end
    return 0
  end
  local wrong, size = wrong_fields(job), redis.call('HSTRLEN', key, 'data')
  local cost = tonumber(job[COST] or 0)
  local is_suspect = tonumber(job[ATTEMPTS] or 0) > 0
  local gone, merge = is_gone(job, size), job[MERGE]
  local parks = not gone and job[COST] and merge and merge ~= entry.queue and is_full(merge)
  if not gone and not parks then
    if #claimed > 0 and (all_tokens + cost > ask.most_tokens or all_bytes + size > ask.most_bytes) then
      return nil, false
    end
    if is_suspect and (#claimed > 0 or not ask.is_alone) then
      waits_for_calm = 1
      return nil, true
    end
  end
  redis.call('LPOP', entry.list)
  entry.is_touched = true
  if #wrong > 0 then redis.call('HDEL', key, unpack(wrong)) end
  if job[COST] then
    entry.jobs, entry.tokens = (entry.jobs or 0) + 1, (entry.tokens or 0) + cost
    entry.bytes = (entry.bytes or 0) + size + JOB_BYTES
  end
  if gone or parks then
    dropped = dropped + 1
    if gone then
      local was_there = redis.call('DEL', key) == 1
      if was_there and size == 0 then entry.no_jobs = (entry.no_jobs or 0) + 1 end
    else
      entry.parked_tokens = (entry.parked_tokens or 0) + cost
      entry.parked_bytes = (entry.parked_bytes or 0) + size + JOB_BYTES
      entry.parked_jobs = (entry.parked_jobs or 0) + 1
      park(id, entry.queue, merge, cost, size + JOB_BYTES)
    end
    return 0
  end
  all_tokens, all_bytes = all_tokens + cost, all_bytes + size
  local execution = take(id, entry.queue, job, #claimed + 1)
  if not entry.has_leases then look_at(entry.queue, now_ms + lease_ms) end
  entry.has_leases = true
  local row = {id, execution, entry.queue, now_us, size <= LARGE and redis.call('HGET', key, 'data')}
  for f = 1, #FIELDS do row[#row + 1] = job[f] end
  claimed[#claimed + 1] = row
  is_quarantined = is_suspect
  return math.max(1, job[COST] and cost or math.floor(size / 4))
end

-- Of the queues of one ask, the one whose turn it is.
local function next_of(queues)
  local first
  for _, entry in ipairs(queues) do
    if not entry.is_done and (not first or (entry.place or 0) < (first.place or 0)) then
      first = entry
    end
  end
  return first
end

local function claim_from(queues, ask)
  while #claimed < ask.most_jobs and dropped < MOST_DROPPED and not is_quarantined do
    local entry = next_of(queues)
    if not entry then return end
    local tokens, goes_on = take_first(entry, ask)
    if tokens then
      if entry.place then entry.place = entry.place + tokens end
    elseif goes_on then
      entry.is_done = true
    else
      return
    end
  end
end

-- Stock tools have emptied a queue: it would keep its place in the line, which others wait for, and
-- a merge queue its sums, which others are refused for.
local function leave_if_emptied(entry)
  if not entry.place and redis.call('EXISTS', 'vf:load:' .. entry.queue) == 0 then return end
  if redis.call('EXISTS', entry.list) == 1 then return end  -- what was parked is back
  leave_line(entry.queue)
  if redis.call('EXISTS', 'vf:line:' .. line_of(entry.queue)) == 1 then ring(entry.queue) end
end

-- Bring what is told of a queue in line with its list.
local function tidy(entry)
  local queue = entry.queue
  if not entry.is_touched then
    if entry.is_empty then leave_if_emptied(entry) end
    unpark_if_there_is_room(queue)
    return
  end
  if entry.no_jobs then
    no_jobs[#no_jobs + 1], no_jobs[#no_jobs + 2] = queue, entry.no_jobs
  end
  local line = line_of(queue)
  if entry.place then redis.call('ZADD', 'vf:line:' .. line, 'XX', text(entry.place), queue) end
  redis.call('SADD', 'rq:queues', entry.list)  -- whoever pushed what it holds
  if entry.jobs then count_out(queue, entry.tokens, entry.bytes, entry.jobs) end
  if entry.parked_jobs then
    count_all(queue, entry.parked_tokens, entry.parked_bytes, entry.parked_jobs)
  end
  if redis.call('EXISTS', entry.list) == 0 then leave_line(queue) end
  unpark_if_there_is_room(queue)
  if redis.call('EXISTS', entry.list) == 1 or redis.call('EXISTS', 'vf:line:' .. line) == 1 then
    ring(queue)
  end
end

local found = find_queues()
-- A suspect at the head of any queue goes first, once there is nothing else in flight.
for _, entry in ipairs(found) do
  local id = redis.pcall('LINDEX', entry.list, 0)
  if type(id) == 'table' then  -- no list: nobody can read it, and others stand behind it
    if entry.place then
      redis.call('ZREM', KEYS[entry.k], entry.queue)
      ring(entry.queue)
    end
    id, entry.is_done = nil, true
  else
    entry.is_empty = not id
  end
  local attempts = id and redis.pcall('HGET', 'rq:job:' .. id, 'vf_attempts')
  if type(attempts) == 'string' and (tonumber(attempts) or 0) > 0 then
    if ARGV[ASKED + 5 * entry.k] == '1' then
      found = {entry}
      break
    end
    waits_for_calm = 1
  end
end

local by_ask = {}
for _, entry in ipairs(found) do
  by_ask[entry.k] = by_ask[entry.k] or {}
  table.insert(by_ask[entry.k], entry)
end
for k = 1, #KEYS do
  local at = ASKED - 4 + 5 * k
  local ask = {
    most_jobs = tonumber(ARGV[at + 1]), most_tokens = tonumber(ARGV[at + 2]),
    most_bytes = tonumber(ARGV[at + 3]), is_alone = ARGV[at + 4] == '1',
  }
  if by_ask[k] then claim_from(by_ask[k], ask) end
  if is_quarantined then break end
end
for _, entry in ipairs(found) do tidy(entry) end
return {waits_for_calm, claimed, no_jobs}
