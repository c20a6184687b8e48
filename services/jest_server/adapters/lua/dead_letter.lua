-- Takes a super-batch out of flight and keeps a letter that tells why.
--
-- KEYS 1 super-batch (hash)  2 dead letters (hash)  3 their order (zset)  4 in flight (zset)  5 counters (hash)
--      6 results (hash)  7 news (stream)
-- ARGV 1 member of the zset  2 super-batch id  3 letter (JSON)  4 time (s)  5 most letters kept  6 job
--      7 prefix of the features' keys  8 time to live of the letters (ms)
-- Returns 1, or 0 if the super-batch was not in flight.
if redis.call('ZREM', KEYS[4], ARGV[1]) == 0 then
  return 0
end
redis.call('HINCRBY', KEYS[5], 'dead_lettered', 1)
redis.call('HINCRBY', KEYS[5], 'in_flight', -1)
redis.call('HSET', KEYS[2], ARGV[2], ARGV[3])
redis.call('ZADD', KEYS[3], ARGV[4], ARGV[2])
for _, old in ipairs(redis.call('ZRANGE', KEYS[3], 0, -1 - tonumber(ARGV[5]))) do
  redis.call('HDEL', KEYS[2], old)
  redis.call('ZREM', KEYS[3], old)
end
redis.call('PEXPIRE', KEYS[2], ARGV[8])
redis.call('PEXPIRE', KEYS[3], ARGV[8])
for _, field in ipairs(redis.call('HKEYS', KEYS[1])) do
  if string.sub(field, 1, 6) == 'shard:' then
    redis.call('UNLINK', ARGV[7] .. string.sub(field, 7))
  end
end
redis.call('UNLINK', KEYS[1], KEYS[6])
redis.call('XADD', KEYS[7], 'MAXLEN', '~', 4096, '*', 'job', ARGV[6], 'id', ARGV[2])
return 1
