-- Lets the leases that the owner still holds live on.
--
-- KEYS 1.. leases (string)
-- ARGV 1 owner  2 time to live (ms)
-- Returns how many it still held.
local renewed = 0
for _, lease in ipairs(KEYS) do
  if redis.call('GET', lease) == ARGV[1] then
    redis.call('PEXPIRE', lease, ARGV[2])
    renewed = renewed + 1
  end
end
return renewed
