-- Registers a job unless its name is taken.
--
-- KEYS 1 jobs (hash)  2 weights (hash)
-- ARGV 1 {name, weight} (JSON)  2 job (JSON)
-- Returns {1 if this call registered it else 0, what is registered (JSON)}.
local jobs, weights = KEYS[1], KEYS[2]
local args = cjson.decode(ARGV[1])
local created = redis.call('HSETNX', jobs, args.name, ARGV[2])
if created == 1 then
  redis.call('HSET', weights, args.name, args.weight)
end
return {created, redis.call('HGET', jobs, args.name)}
