-- Publishes that a version of a reference model is served, and remembers since when; forgets what was not served for long.
--
-- KEYS 1 versions of the model (hash)  2 models (set)
-- ARGV 1 version  2 info (JSON)  3 for how long (ms)  4 how long a version that is not served is remembered (ms)  5 model
local time = redis.call('TIME')
local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)
local since_ms = now_ms
for _, version in ipairs(redis.call('HKEYS', KEYS[1])) do
  local known = cjson.decode(redis.call('HGET', KEYS[1], version))
  if version == ARGV[1] then
    since_ms = known.since_ms
  elseif known.until_ms + ARGV[4] < now_ms then
    redis.call('HDEL', KEYS[1], version)
  end
end
local record = {since_ms = since_ms, until_ms = now_ms + ARGV[3], info = ARGV[2]}
redis.call('HSET', KEYS[1], ARGV[1], cjson.encode(record))
redis.call('PEXPIRE', KEYS[1], ARGV[3] + ARGV[4])
redis.call('SADD', KEYS[2], ARGV[5])
