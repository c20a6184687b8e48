-- Registers one rank's rows; the first rank's call puts the super-batch in flight.
--
-- Its first write is one that Redis refuses when its memory is full: then nothing is stored.
--
-- KEYS 1 super-batch (hash)  2 decision (string)  3 dead letters (hash)  4 in flight (zset)  5 counters (hash)  6 jobs (hash)
-- ARGV 1 member of the zset  2 super-batch id  3 rank  4 digest  5 submission (JSON)  6 world size  7 reference (JSON)
--      8 now (s)  9 deadline (s)  10 most in flight  11 time to live (ms)  12 job  13 step, or empty
-- Returns "accepted", "repeated", "conflict", "queue_full", "decided", "dead" or "no_job".
local member, id, rank, digest, submission = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]
if redis.call('HEXISTS', KEYS[6], ARGV[12]) == 0 then
  return 'no_job'
end
if redis.call('EXISTS', KEYS[2]) == 1 then
  return 'decided'
end
if redis.call('HEXISTS', KEYS[3], id) == 1 then
  return 'dead'
end
if not redis.call('ZSCORE', KEYS[4], member) then
  local in_flight = tonumber(redis.call('HGET', KEYS[5], 'in_flight') or '0')
  if in_flight >= tonumber(ARGV[10]) then
    return 'queue_full'
  end
  redis.call('HSET', KEYS[1], 'world_size', ARGV[6], 'reference', ARGV[7], 'created_at', ARGV[8], 'step', ARGV[13])
  redis.call('ZADD', KEYS[4], ARGV[9], member)
  redis.call('HINCRBY', KEYS[5], 'submitted', 1)
  redis.call('HINCRBY', KEYS[5], 'in_flight', 1)
elseif redis.call('HGET', KEYS[1], 'world_size') ~= ARGV[6]
  or (redis.call('HGET', KEYS[1], 'step') or '') ~= ARGV[13] then
  return 'conflict'
end
local earlier = redis.call('HGET', KEYS[1], 'digest:' .. rank)
if earlier then
  return earlier == digest and 'repeated' or 'conflict'
end
redis.call('HSET', KEYS[1], 'digest:' .. rank, digest, 'rank:' .. rank, submission)
redis.call('PEXPIRE', KEYS[1], ARGV[11])
return 'accepted'
