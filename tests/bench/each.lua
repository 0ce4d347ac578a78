-- Times each request, and tells those that the plugin took its time for from the others. wrk's own percentiles will not do here: it
-- puts in requests that it would have sent while it waited for a slow one, and these would count as slow others.
-- Runs with a thread a connection, since a thread is not told which of its connections is answered. Argument: the method.

local ffi = require("ffi")
ffi.cdef [[
   typedef struct { long seconds, nanoseconds; } bench_time;
   int clock_gettime(int clock, bench_time *time);
]]
local MONOTONIC = 1
local time = ffi.new("bench_time")
local threads = {}
local text, begun

local function now()
   ffi.C.clock_gettime(MONOTONIC, time)
   return tonumber(time.seconds) * 1e6 + tonumber(time.nanoseconds) / 1e3
end

function setup(thread)
   threads[#threads + 1] = thread
end

function init(args)
   slow, others = {}, {}
   text = wrk.format(args[1], nil, nil, args[1] == "POST" and "" or nil)
end

function request()
   begun = now()
   return text
end

function response(status, headers, body)
   local times = body == "Hello, sleeper" and slow or others
   times[#times + 1] = now() - begun
end

local function all(name)
   local times = {}
   for _, thread in ipairs(threads) do
      for _, each in ipairs(thread:get(name)) do times[#times + 1] = each end
   end
   table.sort(times)
   return times
end

local function percentile(times, percent)
   return times[math.ceil(#times * percent / 100)] or 0
end

function done(summary)
   local errors, others, slow = summary.errors, all("others"), all("slow")
   io.write(string.format(
      '\nFIGURES {"requests":%d,"duration_us":%d,"slow":%d,"others_p50_us":%.1f,"others_p99_us":%.1f,' ..
      '"errors":{"connect":%d,"read":%d,"write":%d,"status":%d,"late":%d}}\n',
      summary.requests, summary.duration, #slow, percentile(others, 50), percentile(others, 99),
      errors.connect, errors.read, errors.write, errors.status, errors.timeout))
end
