-- Note which text of a suspect the engine gets next, before it gets it; or that it gets none now.
--
-- KEYS  vf:line:{line} zset, of the queues whose jobs should not wait long
-- ARGV  id, execution, queue, the text's place in the job, '' while the job waits for others,
--       '*' when all texts have run; the text's digest or ''; how long is remembered that one has
--       run well, ms
-- Returns -1 when the job is no longer ours, -2 when the text was condemned in another job, else how
--       many queues have something waiting
local id, execution, queue, place, digest = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local key = 'rq:job:' .. id
if not redis.call('ZSCORE', 'vf:lease:' .. queue, id .. ':' .. execution) then return -1 end
local told = redis.call('HMGET', key, 'vf_at', 'vf_text', 'vf_named')
redis.call('HDEL', key, 'vf_at')
-- That another text comes next, or none is left, says that the one before has run well: it does not
-- kill, whichever job it was named in.
if place ~= '' and place ~= told[1] and string.match(told[1] or '', '^%d+$') then
  acquit(poison_of(queue), told[2] or '', tonumber(ARGV[6]))
end
if place ~= '' and place ~= told[3] then redis.call('HDEL', key, 'vf_named') end
if digest ~= '' and is_known(queue, 'condemned:' .. digest) then
  redis.call('HSET', key, 'vf_at', '')
  return -2
end
-- One that was named in another job is so in this one from here on: its next death condemns it.
if digest ~= '' and is_known(queue, 'named:' .. digest) then
  redis.call('HSET', key, 'vf_named', place)
end
redis.call('HSET', key, 'vf_at', place, 'vf_text', digest)
local waiting = 0
for _, line in ipairs(KEYS) do waiting = waiting + redis.call('ZCARD', line) end
return waiting
