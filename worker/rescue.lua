-- Take over jobs whose lease has expired: their worker died, hung or lost Redis.
--
-- What died with its worker becomes a suspect, and runs alone. A suspect's vf_at says what it was
-- doing when its worker died as well:
--   ''      it waited while others ran: it is innocent, and not charged
--   place   of the text that the engine had. The first time names the text, which runs first then;
--           the second time condemns it: it is refused, and the rest of the job goes on. Both are
--           remembered for a while with the text's digest (vf_text), for other jobs that hold it: in
--           those whose engine gets it from then on it is named as well (mark.lua). Whose engine had
--           it before may have been killed at the same moment: such a death only names it there.
--           So does a death at one that has run well since it was named, wherever that was
--   '*'     anything else: charged to the job as a whole, which is buried when it is the third time;
--           a merge when it is the sixth, as from the third on its writer only looks what became of it
--
-- Looked at are the queues that are named, and of each line those in which a lease may be over. What
-- is left when enough was done waits for the next call.
--
-- KEYS  vf:busy:{line} zset, one a line; the rest as the ledger names them
-- ARGV  1 most attempts   2 RQ's compressed reason for the dead letter   3 time, ISO 8601
--       4 dead letter's TTL, s   5 reply's TTL, s   6 most replies   7 the error, msgpack map
--       8 most leases        9 most condemned texts of a job   10 how long a named text is
--       remembered, ms   11 the same of a condemned one   12 most texts that are remembered
--       13 most queues of a line   then the names of queues
-- Returns {queued again, buried}
local most_attempts, reason, iso, dead_ttl_s = tonumber(ARGV[1]), ARGV[2], ARGV[3], tonumber(ARGV[4])
local most_condemned = tonumber(ARGV[9])
local named_ms, condemned_ms, most_known = tonumber(ARGV[10]), tonumber(ARGV[11]), tonumber(ARGV[12])
local again, buried = 0, 0

local function remember(queue, kind, digest, ms)
  local known = poison_of(queue)
  redis.call('ZREMRANGEBYSCORE', known, '-inf', text(now_ms))
  redis.call('ZREM', known, 'named:' .. digest, 'cleared:' .. digest)
  if redis.call('ZCARD', known) >= most_known then return end
  redis.call('ZADD', known, text(now_ms + ms), kind .. ':' .. digest)
  redis.call('EXPIRE', known, math.ceil(math.max(named_ms, condemned_ms) / 1000))
end

-- Whether a suspect whose worker died at one of its texts may run again.
local function judge(key, queue, at, attempts)
  local found = redis.call('HMGET', key, 'vf_named', 'vf_condemned', 'vf_text')
  local digest = found[3] and #found[3] == 32 and string.match(found[3], '^%x+$')
  local has_run_well = digest and is_known(queue, 'cleared:' .. digest)
  if (found[1] ~= at or has_run_well) and not (digest and is_known(queue, 'condemned:' .. digest)) then
    redis.call('HSET', key, 'vf_named', at)
    if digest then remember(queue, 'named', digest, named_ms) end
    -- A worker that dies at another text each time: that is not a text's fault for ever.
    return attempts < 2 * most_attempts
  end
  if digest then remember(queue, 'condemned', digest, condemned_ms) end
  local condemned = (found[2] and found[2] .. ',' or '') .. at
  local _, commas = string.gsub(condemned, ',', '')
  redis.call('HDEL', key, 'vf_named')
  -- The rest is as suspect as after a first death.
  redis.call('HSET', key, 'vf_condemned', condemned, 'vf_attempts', 1)
  return commas < most_condemned
end

local function may_run_again(key, queue, at, attempts)
  redis.call('HDEL', key, 'vf_at')
  if at == '' then
    redis.call('HINCRBY', key, 'vf_attempts', -1)
    return true
  end
  redis.call('HINCRBY', key, 'vf_deaths', 1)
  if at and at ~= '*' then return judge(key, queue, at, attempts) end
  -- Whether the index holds what a merge brings knows only its writer: it is asked (worker/merger.py).
  local most = is_merge(line_of(queue)) and 2 * most_attempts or most_attempts
  return attempts < most
end

-- The queues to look at, and the zset that has told of each.
local function find_queues()
  local queues, told = {}, {}
  for at = 14, #ARGV do queues[#queues + 1] = ARGV[at] end
  for _, busy in ipairs(KEYS) do
    local due = redis.call('ZRANGEBYSCORE', busy, '-inf', text(now_ms), 'LIMIT', 0, ARGV[13])
    for _, queue in ipairs(due) do
      queues[#queues + 1] = queue
      told[#queues] = busy
    end
  end
  return queues, told
end

-- When the queue is looked at next: when its first lease is over.
local function look_again(queue, busy)
  local first = redis.pcall('ZRANGE', 'vf:lease:' .. queue, 0, 0, 'WITHSCORES')[2]
  begin_to_write()
  if first then
    redis.call('ZADD', busy, text(tonumber(first)), queue)
  else
    redis.call('ZREM', busy, queue)
  end
end

local left = tonumber(ARGV[8])
local queues, told = find_queues()
for k, queue in ipairs(queues) do
  if left <= 0 then break end
  local lease = 'vf:lease:' .. queue
  local expired = redis.pcall('ZRANGEBYSCORE', lease, '-inf', text(now_ms), 'LIMIT', 0, left)
  if expired.err then expired = {} end  -- no claim made it: others' leases are looked at all the same
  left = left - #expired
  for _, member in ipairs(expired) do
    local id, execution = string.match(member, '^(.-):(.*)$')
    local key = 'rq:job:' .. (id or '')
    local job = {}
    if id then
      unlease(id, execution, queue)
      job = redis.call('HMGET', key, 'vf_attempts', 'worker_name', 'vf_sub',
        'vf_block', 'vf_docs', 'vf_box', 'vf_refused', 'vf_at')
    else
      redis.call('ZREM', lease, member)  -- nobody's: no claim writes such a one
    end
    if not job[1] then
      redis.call('DEL', key)
    elseif may_run_again(key, queue, job[8], tonumber(job[1])) then
      queue_job(id, queue, true)
      again = again + 1
    else
      local docs, refused = tonumber(job[5] or 0), tonumber(job[7] or 0)
      bury(id, queue, job[2] or '', execution, reason, ARGV[7], iso, dead_ttl_s)
      mark(job[3] or '', job[4] or 0, false, docs, refused)
      if job[6] then
        answer(job[6], id, cmsgpack.pack({id, 'error', cmsgpack.unpack(ARGV[7])}),
          tonumber(ARGV[5]), tonumber(ARGV[6]))
      end
      buried = buried + 1
    end
  end
  if told[k] then look_again(queue, told[k]) end
  -- What stock tools put into a queue did not join the line.
  if is_filled(queue) and join_line(queue) then ring(queue) end
end
return {again, buried}
