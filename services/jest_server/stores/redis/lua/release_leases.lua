-- Ends the leases that the owner still holds.
--
-- KEYS 1.. leases (string)
-- ARGV 1 {owner} (JSON)
-- Returns how many it still held.
local args = cjson.decode(ARGV[1])
local held = 0
for _, lease in ipairs(KEYS) do
  if redis.call('GET', lease) == args.owner then
    redis.call('UNLINK', lease)
    held = held + 1
  end
end
return held
