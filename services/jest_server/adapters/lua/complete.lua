-- Hands a shard's result in: stores it, takes the shard out of the queue and tells the news; a second result is ignored.
--
-- KEYS 1 shards (stream)  2 super-batch (hash)  3 results (hash)  4 features (string)  5 news (stream)
-- ARGV 1 group  2 entry id  3 shard id  4 result  5 job  6 super-batch id
-- Returns 1 if the result was stored, else 0.
redis.call('XACK', KEYS[1], ARGV[1], ARGV[2])
redis.call('XDEL', KEYS[1], ARGV[2])
local field = 'shard:' .. ARGV[3]
local entry = redis.call('HGET', KEYS[2], field)
if not entry then
  return 0
end
redis.call('HDEL', KEYS[2], field)
redis.call('XACK', KEYS[1], ARGV[1], entry) -- another one if the shard was released and queued again in the meantime
redis.call('XDEL', KEYS[1], entry)
redis.call('UNLINK', KEYS[4])
redis.call('HSET', KEYS[3], ARGV[3], ARGV[4])
redis.call('PEXPIRE', KEYS[3], redis.call('PTTL', KEYS[2]))
redis.call('XADD', KEYS[5], 'MAXLEN', '~', 4096, '*', 'job', ARGV[5], 'id', ARGV[6])
return 1
