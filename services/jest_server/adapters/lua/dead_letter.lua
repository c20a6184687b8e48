-- Takes a super-batch out of flight and keeps a letter that tells why. Needs let_go.
--
-- KEYS 1 dead letters (hash)  2 their order (zset)  3 counters (hash)
-- ARGV 1 job  2 super-batch id  3 letter (JSON)  4 time (s)  5 most letters kept  6 time to live of the letters (ms)
--      7 group  8 prefix of all keys
-- Returns 1, or 0 if the super-batch was not in flight.
if not let_go(ARGV[8], ARGV[7], ARGV[1], ARGV[2]) then
  return 0
end
redis.call('HINCRBY', KEYS[3], 'dead_lettered', 1)
redis.call('HINCRBY', KEYS[3], 'in_flight', -1)
redis.call('HSET', KEYS[1], ARGV[2], ARGV[3])
redis.call('ZADD', KEYS[2], ARGV[4], ARGV[2])
for _, old in ipairs(redis.call('ZRANGE', KEYS[2], 0, -1 - tonumber(ARGV[5]))) do
  redis.call('HDEL', KEYS[1], old)
  redis.call('ZREM', KEYS[2], old)
end
redis.call('PEXPIRE', KEYS[1], ARGV[6])
redis.call('PEXPIRE', KEYS[2], ARGV[6])
return 1
