-- Puts an entry that still belongs to this consumer back into the stream, for anyone to take at once. Needs held.
--
-- The entry is a new one at the stream's end: Redis cannot hand an entry of a group back, only to a named consumer.
--
-- KEYS 1 shards (stream)  2 super-batch (hash)
-- ARGV 1 group  2 consumer  3 entry id  4 earlier deliveries  5 job  6 super-batch id  7 shard id
-- Returns 1 if it was put back, else 0.
if not held(KEYS[1], ARGV[1], ARGV[2], ARGV[3]) then
  return 0
end
redis.call('XACK', KEYS[1], ARGV[1], ARGV[3])
redis.call('XDEL', KEYS[1], ARGV[3])
local field = 'shard:' .. ARGV[7]
if redis.call('HEXISTS', KEYS[2], field) == 0 then
  return 0
end
local entry = redis.call('XADD', KEYS[1], '*', 'job', ARGV[5], 'id', ARGV[6], 'shard', ARGV[7], 'earlier', ARGV[4])
redis.call('HSET', KEYS[2], field, entry)
return 1
