-- Forgets a job and all that belongs to it. Needs let_go. Of decisions there may be very many: a call forgets no more than a
-- batch of them, so that others need not wait long, and the last call forgets the job itself with all the rest at once.
--
-- KEYS 1 jobs (hash)  2 counters (hash)  3 dead letters (hash)  4 their order (zset)  5 index of decisions (zset)
--      6 in flight (zset)  7 weights (hash)  8 lines (hash)
-- ARGV 1 job  2 batch  3 group  4 prefix of all keys
-- Returns "more" if it has to be called again, else "deleted", or "none" if there was no such job.
local job, batch, prefix = ARGV[1], tonumber(ARGV[2]), ARGV[4]
local decided = redis.call('ZRANGE', KEYS[5], 0, batch - 1)
for _, id in ipairs(decided) do
  redis.call('UNLINK', prefix .. 'decision:' .. job .. '/' .. id)
end
redis.call('ZREMRANGEBYRANK', KEYS[5], 0, batch - 1)
if #decided == batch then
  return 'more'
end
local start = job .. '/'
for _, member in ipairs(redis.call('ZRANGE', KEYS[6], 0, -1)) do
  if string.sub(member, 1, #start) == start then
    let_go(prefix, ARGV[3], job, string.sub(member, #start + 1))
  end
end
for _, id in ipairs(redis.call('ZRANGE', KEYS[4], 0, -1)) do
  redis.call('UNLINK', prefix .. 'set_aside:' .. job .. '/' .. id)
end
for _, line in ipairs(redis.call('HKEYS', KEYS[8])) do
  redis.call('ZREM', prefix .. 'past_turns:' .. line, job)
end
redis.call('UNLINK', KEYS[2], KEYS[3], KEYS[4])
redis.call('HDEL', KEYS[7], job)
return redis.call('HDEL', KEYS[1], job) == 1 and 'deleted' or 'none'
