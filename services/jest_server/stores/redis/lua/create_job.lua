-- Registers a job unless its name is taken.
--
-- KEYS 1 jobs (hash)  2 weights (hash)
-- ARGV 1 name  2 job (JSON)  3 weight
-- Returns {1 if this call registered it else 0, what is registered (JSON)}.
local created = redis.call('HSETNX', KEYS[1], ARGV[1], ARGV[2])
if created == 1 then
  redis.call('HSET', KEYS[2], ARGV[1], ARGV[3])
end
return {created, redis.call('HGET', KEYS[1], ARGV[1])}
