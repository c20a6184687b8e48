-- Loaded before keep and release: tells whether an entry still belongs to a consumer. After a flush there may be no stream
-- or no group; then it does not.
local function held(stream, group, consumer, entry)
  local pending = redis.pcall('XPENDING', stream, group, entry, entry, 1, consumer)
  if pending.err and not string.find(pending.err, 'NOGROUP', 1, true) then
    error(pending)
  end
  return #pending > 0
end

