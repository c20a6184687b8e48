-- Puts an entry that still belongs to this consumer back into its line, for anyone to take at once. Needs held and turns.
--
-- KEYS 1 shards of the line (stream)  2 super-batch (hash)  3 in flight (zset)  4 queued (zset)
-- ARGV 1 group  2 consumer  3 entry id  4 earlier deliveries  5 job  6 super-batch id  7 shard id  8 prefix of all keys
--      9 line
-- Returns 1 if it was put back, else 0.
if not held(KEYS[1], ARGV[1], ARGV[2], ARGV[3]) then
  return 0
end
redis.call('XACK', KEYS[1], ARGV[1], ARGV[3])
redis.call('XDEL', KEYS[1], ARGV[3])
local field = 'shard:' .. ARGV[7]
local deadline = redis.call('ZSCORE', KEYS[3], ARGV[5] .. '/' .. ARGV[6])
if not deadline or redis.call('HEXISTS', KEYS[2], field) == 0 then
  redis.call('ZREM', KEYS[4], ARGV[5] .. '/' .. ARGV[6] .. '/' .. ARGV[7])
  return 0
end
redis.call('HSET', KEYS[2], field, 'waiting:' .. ARGV[4])
put_in_line(ARGV[8], ARGV[9], ARGV[5], ARGV[6] .. '/' .. ARGV[7], deadline)
return 1
