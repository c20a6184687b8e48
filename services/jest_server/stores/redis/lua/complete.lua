-- Hands a shard's result in: stores it, takes the shard out of the queue and tells the news; a second result is ignored.
-- Needs turns and usage.
--
-- KEYS 1 shards of the line (stream)  2 super-batch (hash)  3 results (hash)  4 features (string)  5 news (stream)
--      6 queued (zset)  7 usage (hash)
-- ARGV 1 group  2 entry id  3 shard id  4 result  5 job  6 super-batch id  7 prefix of all keys  8 line
-- Returns 1 if the result was stored, else 0.
local job, id, shard_id = ARGV[5], ARGV[6], ARGV[3]
redis.call('XACK', KEYS[1], ARGV[1], ARGV[2])
redis.call('XDEL', KEYS[1], ARGV[2])
local field = 'shard:' .. shard_id
local state = redis.call('HGET', KEYS[2], field)
if not state then
  return 0
end
redis.call('HDEL', KEYS[2], field)
if string.sub(state, 1, 8) == 'waiting:' then -- it was released in the meantime
  take_out_of_line(ARGV[7], ARGV[8], job, id .. '/' .. shard_id)
else -- another entry if it was released and taken again in the meantime
  redis.call('XACK', KEYS[1], ARGV[1], state)
  redis.call('XDEL', KEYS[1], state)
end
redis.call('ZREM', KEYS[6], job .. '/' .. id .. '/' .. shard_id)
account(KEYS[7], 'bytes', job, id, -redis.call('STRLEN', KEYS[4]))
redis.call('UNLINK', KEYS[4])
redis.call('HSET', KEYS[3], shard_id, ARGV[4])
redis.call('PEXPIRE', KEYS[3], redis.call('PTTL', KEYS[2]))
redis.call('XADD', KEYS[5], 'MAXLEN', '~', 4096, '*', 'job', job, 'id', id)
return 1
