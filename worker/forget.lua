-- Forget queues that nothing is in, and nothing of theirs anywhere else.
--
-- KEYS  1 rq:queues set
-- ARGV  the queues' names
-- also  rq:queue:{queue} list, vf:lease:{queue} zset, RQ's registries of the queue zset,
--       rq:workers:{queue} set, vf:load:{queue} hash
-- Returns the names of those that were forgotten
local forgotten = {}
for _, queue in ipairs(ARGV) do
  local used = redis.call('EXISTS', 'rq:queue:' .. queue, 'vf:lease:' .. queue,
    'rq:failed:' .. queue, 'rq:finished:' .. queue, 'rq:scheduled:' .. queue, 'rq:deferred:' .. queue)
  if used == 0 then
    redis.call('SREM', KEYS[1], 'rq:queue:' .. queue)
    redis.call('DEL', 'rq:workers:' .. queue)
    forgotten[#forgotten + 1] = queue
  end
end
return forgotten
