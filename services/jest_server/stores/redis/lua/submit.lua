-- Registers one rank's rows; the first rank's call puts the super-batch in flight. Needs usage.
--
-- Its first write is one that Redis refuses when its memory is full: then nothing is stored.
--
-- KEYS 1 super-batch (hash)  2 decision (string)  3 dead letters (hash)  4 in flight (zset)  5 counters (hash)  6 jobs (hash)
--      7 usage (hash)
-- ARGV 1 member of the zset  2 super-batch id  3 rank  4 digest  5 submission (JSON)  6 world size  7 reference (JSON)
--      8 now (s)  9 deadline (s)  10, 11, 12 most in flight of a job, a tenant, the server (0: any)
--      13 time to live (ms)  14 job  15 step, or empty  16 line
-- Returns "accepted", "repeated", "conflict", "decided", "dead" or "no_job"; "job", "tenant" or "server" if that is full.
local member, id, rank, digest, submission, job = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[14]
if redis.call('HEXISTS', KEYS[6], job) == 0 then
  return 'no_job'
end
if redis.call('EXISTS', KEYS[2]) == 1 then
  return 'decided'
end
if redis.call('HEXISTS', KEYS[3], id) == 1 then
  return 'dead'
end
if not redis.call('ZSCORE', KEYS[4], member) then
  local limits = {job = tonumber(ARGV[10]), tenant = tonumber(ARGV[11]), server = tonumber(ARGV[12])}
  local full = who_is_full(KEYS[7], 'super_batches', job, 1, limits)
  if full then
    return full
  end
  redis.call(
    'HSET', KEYS[1], 'world_size', ARGV[6], 'reference', ARGV[7], 'created_at', ARGV[8], 'step', ARGV[15], 'line', ARGV[16]
  )
  redis.call('ZADD', KEYS[4], ARGV[9], member)
  redis.call('HINCRBY', KEYS[5], 'submitted', 1)
  redis.call('HINCRBY', KEYS[5], 'in_flight', 1)
  account(KEYS[7], 'super_batches', job, id, 1)
elseif redis.call('HGET', KEYS[1], 'world_size') ~= ARGV[6]
  or (redis.call('HGET', KEYS[1], 'step') or '') ~= ARGV[15] then
  return 'conflict'
end
local earlier = redis.call('HGET', KEYS[1], 'digest:' .. rank)
if earlier then
  return earlier == digest and 'repeated' or 'conflict'
end
redis.call('HSET', KEYS[1], 'digest:' .. rank, digest, 'rank:' .. rank, submission)
redis.call('PEXPIRE', KEYS[1], ARGV[13])
return 'accepted'
