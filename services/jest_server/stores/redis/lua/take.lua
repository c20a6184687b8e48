-- For each example: its value if there is one, else a lease on computing it, unless another owner holds that.
--
-- KEYS 1..n values (string)  n+1..2n leases (string), in the same order
-- ARGV 1 {owner, ttl_ms: time to live of a lease, value_bytes: a value of another size counts as absent} (JSON)
-- Returns a list of the value, or 1 if the owner now holds the lease, or 0 if another does.
local args = cjson.decode(ARGV[1])
local size, count = tonumber(args.value_bytes), #KEYS / 2
local taken = {}
for i = 1, count do
  local value = redis.call('GET', KEYS[i])
  if value and #value == size then
    taken[i] = value
  else
    local lease = KEYS[count + i]
    local mine = redis.call('SET', lease, args.owner, 'NX', 'PX', args.ttl_ms) or redis.call('GET', lease) == args.owner
    taken[i] = mine and 1 or 0
  end
end
return taken
