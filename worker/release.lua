-- Give claims back: to the front of their queues, and no attempt is charged.
--
-- KEYS  none of its own: as the ledger names them
-- ARGV  for each job: id, execution, queue
-- Returns how many were still ours; one that was abandoned is not: its death is yet to be judged
local released = 0
for at = #ARGV - 2, 1, -3 do
  local id, execution, queue = ARGV[at], ARGV[at + 1], ARGV[at + 2]
  local until_ms = redis.call('ZSCORE', 'vf:lease:' .. queue, id .. ':' .. execution)
  if until_ms and tonumber(until_ms) > 0 and unlease(id, execution, queue)
    and give_back(id, queue) then
    released = released + 1
  end
end
return released
