-- Registers a job unless its name is taken.
--
-- KEYS 1 jobs (hash)
-- ARGV 1 name  2 job (JSON)
-- Returns {1 if this call registered it else 0, what is registered (JSON)}.
local created = redis.call('HSETNX', KEYS[1], ARGV[1], ARGV[2])
return {created, redis.call('HGET', KEYS[1], ARGV[1])}
