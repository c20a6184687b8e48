-- Ends the leases that the owner still holds.
--
-- KEYS 1.. leases (string)
-- ARGV 1 owner
-- Returns how many it still held.
local held = 0
for _, lease in ipairs(KEYS) do
  if redis.call('GET', lease) == ARGV[1] then
    redis.call('UNLINK', lease)
    held = held + 1
  end
end
return held
