-- Extends the leases that the owner still holds.
--
-- KEYS 1.. leases (string)
-- ARGV 1 {owner, ttl_ms} (JSON)
-- Returns how many it still held.
local args = cjson.decode(ARGV[1])
local renewed = 0
for _, lease in ipairs(KEYS) do
  if redis.call('GET', lease) == args.owner then
    redis.call('PEXPIRE', lease, args.ttl_ms)
    renewed = renewed + 1
  end
end
return renewed
