-- Puts entries that still belong to this consumer back into the stream, for anyone to take at once.
--
-- KEYS 1 shards (stream)
-- ARGV 1 group  2 consumer  3.. groups of five: entry id, earlier deliveries, job, super-batch id, shard id
-- Returns how many were put back.
local released = 0
for i = 3, #ARGV, 5 do
  if #redis.call('XPENDING', KEYS[1], ARGV[1], ARGV[i], ARGV[i], 1, ARGV[2]) > 0 then
    redis.call('XACK', KEYS[1], ARGV[1], ARGV[i])
    redis.call('XDEL', KEYS[1], ARGV[i])
    redis.call('XADD', KEYS[1], '*', 'job', ARGV[i + 2], 'id', ARGV[i + 3], 'shard', ARGV[i + 4], 'earlier', ARGV[i + 1])
    released = released + 1
  end
end
return released
