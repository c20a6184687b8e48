-- Starts the idle time of claims anew, as far as they are still the consumer's. Needs claims.
--
-- KEYS 1 heartbeats of the queue (zset)  2.. super-batch (hash) of each claim
-- ARGV 1 {consumer, claims: [{member: JOB/ID/SHARD, shard_id}, ...]} (JSON)
-- Returns how many are still the consumer's.
local heartbeats = KEYS[1]
local args = cjson.decode(ARGV[1])
local held, now = 0, now_us()
for i, claim in ipairs(args.claims) do
  if redis.call('HGET', KEYS[i + 1], 'claimed_by:' .. claim.shard_id) == args.consumer then
    touch(heartbeats, claim.member, now)
    held = held + 1
  end
end
return held
