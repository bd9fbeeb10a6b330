-- Take over jobs whose lease has expired: their worker died, hung or lost Redis.
--
-- KEYS  vf:lease:{queue} zset, one a queue; the rest as the ledger names them
-- ARGV  1 most attempts   2 RQ's compressed reason for the dead letter   3 time, ISO 8601
--       4 dead letter's TTL, s   5 reply's TTL, s   6 most replies   7 the error, msgpack map
--       8 most jobs a queue   then for each queue its name
-- Returns {queued again, buried}
local most_attempts, reason, iso, dead_ttl_s = tonumber(ARGV[1]), ARGV[2], ARGV[3], tonumber(ARGV[4])
local again, buried = 0, 0
for k, lease in ipairs(KEYS) do
  local queue = ARGV[8 + k]
  local expired = redis.call('ZRANGEBYSCORE', lease, '-inf', text(now_ms), 'LIMIT', 0, ARGV[8])
  for _, member in ipairs(expired) do
    local id, execution = string.match(member, '^(.-):(.*)$')
    unlease(id, execution, queue)
    local job = redis.call('HMGET', 'rq:job:' .. id, 'vf_attempts', 'worker_name', 'vf_sub',
      'vf_block', 'vf_docs', 'vf_box', 'vf_refused')
    if not job[1] then
      redis.call('DEL', 'rq:job:' .. id)
    elseif tonumber(job[1]) < most_attempts then
      queue_job(id, queue, true)
      again = again + 1
    else
      local docs, refused = tonumber(job[5] or 0), tonumber(job[7] or 0)
      bury(id, queue, job[2] or '', execution, reason, iso, dead_ttl_s)
      mark(job[3] or '', job[4] or 0, false, docs, refused)
      if job[6] then
        answer(job[6], cmsgpack.pack({id, 'error', cmsgpack.unpack(ARGV[7])}),
          tonumber(ARGV[5]), tonumber(ARGV[6]))
      end
      buried = buried + 1
    end
  end
end
return {again, buried}
