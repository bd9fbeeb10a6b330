-- Texts that were named have run well: no death that is judged from here on is their second one.
--
-- KEYS  1 vf:poison:{pool} zset
-- ARGV  1 how long that is remembered, ms   then the texts' digests
for at = 2, #ARGV do acquit(KEYS[1], ARGV[at], tonumber(ARGV[1])) end
