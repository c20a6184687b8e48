-- Takes over the claims that were without a heartbeat for longest, if it was long enough. Needs claims.
--
-- KEYS 1 namespace  2 heartbeats of the queue (zset)
-- ARGV 1 {consumer, idle_us: least idle time, count} (JSON)
-- Returns a list of {job, super-batch id, shard id, deliveries with this one, time of queueing (ms), features}.
local namespace, heartbeats = KEYS[1], KEYS[2]
local args = cjson.decode(ARGV[1])
local count, now = tonumber(args.count), now_us()
local idle_since = now - args.idle_us
local members = {}
while #members < count do
  local member = redis.call('ZRANGE', heartbeats, '-inf', idle_since, 'BYSCORE', 'LIMIT', #members, 1)[1]
  if not member then
    break
  end
  if not drop_if_expired(namespace, heartbeats, member) then
    members[#members + 1] = member
  end
end
local claimed = {}
for i, member in ipairs(members) do
  claimed[i] = deliver(namespace, heartbeats, args.consumer, member, now)
end
return claimed
