-- Puts a dead-lettered super-batch back in flight as it was submitted, without what was uploaded. Needs usage.
--
-- KEYS 1 dead letters (hash)  2 their order (zset)  3 counters (hash)  4 super-batch (hash)  5 set aside (hash)
--      6 in flight (zset)  7 usage (hash)
-- ARGV 1 job  2 super-batch id  3 now (s)  4 deadline (s)  5, 6, 7 most in flight of a job, a tenant, the server (0: any)
--      8 time to live (ms)  9 reference (JSON)  10 line
-- Returns "requeued", "none" if there is no letter, "forgotten" if what was submitted is not kept any more; "job",
-- "tenant" or "server" if that is full.
local job, id = ARGV[1], ARGV[2]
if redis.call('HEXISTS', KEYS[1], id) == 0 then
  return 'none'
end
if redis.call('EXISTS', KEYS[5]) == 0 then
  return 'forgotten'
end
local limits = {job = tonumber(ARGV[5]), tenant = tonumber(ARGV[6]), server = tonumber(ARGV[7])}
local full = who_is_full(KEYS[7], 'super_batches', job, 1, limits)
if full then
  return full
end
redis.call('HSET', KEYS[5], 'reference', ARGV[9], 'line', ARGV[10], 'created_at', ARGV[3])
redis.call('RENAME', KEYS[5], KEYS[4])
redis.call('PEXPIRE', KEYS[4], ARGV[8])
redis.call('ZADD', KEYS[6], ARGV[4], job .. '/' .. id)
redis.call('HDEL', KEYS[1], id)
redis.call('ZREM', KEYS[2], id)
redis.call('HINCRBY', KEYS[3], 'dead_lettered', -1)
redis.call('HINCRBY', KEYS[3], 'in_flight', 1)
account(KEYS[7], 'super_batches', job, id, 1)
return 'requeued'
