-- Note which text of a suspect the engine gets next, before it gets it.
--
-- KEYS  vf:line:{line} zset, of the queues whose jobs should not wait long
-- ARGV  id, execution, queue, the text's place in the job, '' while the job waits for others
-- Returns -1 when the job is no longer ours, else how many queues have something waiting
local id, execution, queue, place = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local key = 'rq:job:' .. id
if not redis.call('ZSCORE', 'vf:lease:' .. queue, id .. ':' .. execution) then return -1 end
redis.call('HDEL', key, 'vf_at')
-- That another text comes next says that the one that was named has run well.
if place ~= '' and redis.call('HGET', key, 'vf_named') ~= place then
  redis.call('HDEL', key, 'vf_named')
end
redis.call('HSET', key, 'vf_at', place)
local waiting = 0
for _, line in ipairs(KEYS) do waiting = waiting + redis.call('ZCARD', line) end
return waiting
