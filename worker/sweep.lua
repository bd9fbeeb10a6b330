-- Make true what RQ's tools are shown of queues: those that nothing is in are forgotten, workers that
-- are gone leave them, and this worker shows itself in its own. A queue of the default tenant is shown
-- empty too while somebody serves it, but for merge queues: there is one for each collection.
--
-- KEYS  1 rq:queues set   2 rq:workers set   3 rq:worker:{worker} hash: only its name is used
--       4 vf:sweeper string
-- ARGV  1 how long one worker is the sweeper, ms
--       then for each queue: its name, '1' if this worker serves it
-- also  rq:queue:{queue} list, vf:lease:{queue} zset, vf:parked:{queue} list, RQ's registries of the
--       queue zset, rq:workers:{queue} set, vf:busy:{line} zset
-- Returns the names of this worker's own that are shown
redis.call('DEL', 'vf:never')  -- never refused by a full Redis, which lets the rest pass then

-- To compare the workers of each queue takes long where there are many of both: one does it for all.
local sweeper = redis.call('GET', KEYS[4])
local is_sweeper = not sweeper or sweeper == KEYS[3]
if not sweeper then redis.call('SET', KEYS[4], KEYS[3], 'PX', ARGV[1]) end

local shown = {}
for at = 2, #ARGV, 2 do
  local queue, is_own = ARGV[at], ARGV[at + 1] == '1'
  local workers, tenant, line = 'rq:workers:' .. queue, string.match(queue, '^vf%.([^.]*)%.(.+)$')
  if is_sweeper then
    local left = redis.pcall('SDIFF', workers, KEYS[2])
    if left.err and not string.find(left.err, 'wrong kind of value') then return left end
    if left.err then redis.call('DEL', workers) end  -- somebody made something else of it
    for _, gone in ipairs(left) do redis.call('SREM', workers, gone) end
  end
  local is_shown = redis.call('EXISTS', 'rq:queue:' .. queue, 'vf:lease:' .. queue,
    'vf:parked:' .. queue, 'rq:failed:' .. queue, 'rq:finished:' .. queue, 'rq:scheduled:' .. queue,
    'rq:deferred:' .. queue, 'rq:canceled:' .. queue) > 0
  if not is_shown and tenant == '-' and string.sub(line, 1, 6) ~= 'merge.' then
    is_shown = is_own or redis.call('EXISTS', workers) == 1
  end
  if not is_shown then
    redis.call('SREM', KEYS[1], 'rq:queue:' .. queue)
    redis.call('DEL', workers)
    redis.call('ZREM', 'vf:busy:' .. (line or queue), queue)
  elseif is_own then
    -- Together: who has workers is known, and so is forgotten one day.
    redis.call('SADD', KEYS[1], 'rq:queue:' .. queue)
    redis.call('SADD', workers, KEYS[3])
    shown[#shown + 1] = queue
  end
end
return shown
