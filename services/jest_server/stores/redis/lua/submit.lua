-- Registers one rank's rows; the first rank's call puts the super-batch in flight. Needs usage.
--
-- Its first write is one that Redis refuses when its memory is full: then nothing is stored.
--
-- KEYS 1 super-batch (hash)  2 decision (string)  3 dead letters (hash)  4 in flight (zset)  5 counters (hash)  6 jobs (hash)
--      7 usage (hash)
-- ARGV 1 member of the zset  2 super-batch id  3 rank  4 digest  5 submission (JSON)  6 rows  7 world size
--      8 reference (JSON)  9 now (s)  10 deadline (s)  11, 12, 13 most in flight of a job, a tenant, the server (0: any)
--      14 time to live (ms)  15 job  16 step, or empty  17 line
-- Returns {status}: "decided", "dead" or "no_job"; "job", "tenant" or "server" if that is full. If the super-batch is in
-- flight, {"accepted", "repeated" or "conflict", pinned reference (JSON), pinned step or empty}, and for "repeated" the
-- positions (JSON) of each upload of this rank.
local super_batch, member, id, rank, digest, job = KEYS[1], ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[15]
local function in_flight(status)
  return {status, redis.call('HGET', super_batch, 'reference'), redis.call('HGET', super_batch, 'step') or ''}
end
if redis.call('HEXISTS', KEYS[6], job) == 0 then
  return {'no_job'}
end
if redis.call('EXISTS', KEYS[2]) == 1 then
  return {'decided'}
end
if redis.call('HEXISTS', KEYS[3], id) == 1 then
  return {'dead'}
end
if not redis.call('ZSCORE', KEYS[4], member) then
  local limits = {job = tonumber(ARGV[11]), tenant = tonumber(ARGV[12]), server = tonumber(ARGV[13])}
  local full = who_is_full(KEYS[7], 'super_batches', job, 1, limits)
  if full then
    return {full}
  end
  redis.call(
    'HSET', super_batch, 'world_size', ARGV[7], 'reference', ARGV[8], 'created_at', ARGV[9], 'step', ARGV[16], 'line', ARGV[17]
  )
  redis.call('ZADD', KEYS[4], ARGV[10], member)
  redis.call('HINCRBY', KEYS[5], 'submitted', 1)
  redis.call('HINCRBY', KEYS[5], 'in_flight', 1)
  account(KEYS[7], 'super_batches', job, id, 1)
elseif redis.call('HGET', super_batch, 'world_size') ~= ARGV[7]
  or (redis.call('HGET', super_batch, 'step') or '') ~= ARGV[16] then
  return in_flight('conflict')
end
local earlier = redis.call('HGET', super_batch, 'digest:' .. rank)
if earlier and earlier ~= digest then
  return in_flight('conflict')
end
if earlier then
  local answer, uploads_of_rank = in_flight('repeated'), 'upload:' .. rank .. ':'
  for _, field in ipairs(redis.call('HKEYS', super_batch)) do
    if string.sub(field, 1, #uploads_of_rank) == uploads_of_rank then
      answer[#answer + 1] = redis.call('HGET', super_batch, field)
    end
  end
  return answer
end
redis.call('HSET', super_batch, 'digest:' .. rank, digest, 'rank:' .. rank, ARGV[5], 'rows:' .. rank, ARGV[6])
redis.call('PEXPIRE', super_batch, ARGV[14])
return in_flight('accepted')
