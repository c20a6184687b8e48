-- Claims the next shards of a model queue for a consumer. Needs fair_queue and claims.
--
-- KEYS 1 namespace  2 heartbeats of the queue (zset)  3 weights (hash)
-- ARGV 1 {queue, consumer, count} (JSON)
-- Returns a list of {job, super-batch id, shard id, deliveries with this one, time of queueing (ms), features}.
local namespace, heartbeats, weights = KEYS[1], KEYS[2], KEYS[3]
local args = cjson.decode(ARGV[1])
local claimed, count, now = {}, tonumber(args.count), now_us()
while #claimed < count do
  local member = take_next(namespace, args.queue, weights)
  if not member then
    break
  end
  if not drop_if_expired(namespace, heartbeats, member) then
    claimed[#claimed + 1] = deliver(namespace, heartbeats, args.consumer, member, now)
  end
end
return claimed
