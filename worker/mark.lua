-- Note which text of a suspect the engine gets next, before it gets it; or that it gets none now.
--
-- KEYS  vf:line:{line} zset, of the queues whose jobs should not wait long
-- ARGV  id, execution, queue, the text's place in the job, '' while the job waits for others,
--       '*' when all texts have run; the text's digest or ''
-- Returns -1 when the job is no longer ours, -2 when the text was condemned in another job, else how
--       many queues have something waiting
local id, execution, queue, place, digest = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local key = 'rq:job:' .. id
if not redis.call('ZSCORE', 'vf:lease:' .. queue, id .. ':' .. execution) then return -1 end
redis.call('HDEL', key, 'vf_at')
-- That another text comes next says that the one that was named has run well.
if place ~= '' and redis.call('HGET', key, 'vf_named') ~= place then
  redis.call('HDEL', key, 'vf_named')
end
if digest ~= '' and is_known(queue, 'condemned:' .. digest) then
  redis.call('HSET', key, 'vf_at', '')
  return -2
end
redis.call('HSET', key, 'vf_at', place, 'vf_text', digest)
local waiting = 0
for _, line in ipairs(KEYS) do waiting = waiting + redis.call('ZCARD', line) end
return waiting
