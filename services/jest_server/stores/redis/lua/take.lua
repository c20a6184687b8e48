-- For each example: its value if there is one, else a lease on computing it, unless somebody else holds that.
--
-- KEYS 1..n values (string)  n+1..2n leases (string), in the same order
-- ARGV 1 owner  2 time to live of a lease (ms)  3 size of a value (bytes): one of another size counts as absent
-- Returns a list of the value, or 1 if the owner now holds the lease, or 0 if another does.
local owner, size, count = ARGV[1], tonumber(ARGV[3]), #KEYS / 2
local taken = {}
for i = 1, count do
  local value = redis.call('GET', KEYS[i])
  if value and #value == size then
    taken[i] = value
  else
    local lease = KEYS[count + i]
    local mine = redis.call('SET', lease, owner, 'NX', 'PX', ARGV[2]) or redis.call('GET', lease) == owner
    taken[i] = mine and 1 or 0
  end
end
return taken
