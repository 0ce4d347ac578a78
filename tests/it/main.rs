//! The integration tests: the real binary, real sockets, real children.

#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stderr, reason = "a test says what is wrong by panicking")]

mod support;

mod answers;
mod attack;
mod cancel;
mod clients;
mod confinement;
mod data_dir;
mod deploy;
mod differential;
mod discovery;
mod docs;
mod drain;
mod durability;
mod failed_requests;
mod fidelity;
mod frames;
mod gate_limits;
mod gone_clients;
mod host_limits;
mod hosts;
mod http11;
mod identity;
mod isolation;
mod kv;
mod layers;
mod license;
mod license_fuzz;
mod license_set;
mod license_vectors;
mod license_vendor;
mod lifecycle;
mod limits;
mod logs;
mod operator;
mod orphans;
mod overload;
mod plugin_settings;
mod proxies;
mod run_dir;
mod scenarios;
mod screens;
mod sdk;
mod sdk_concurrency;
mod slow_clients;
mod slow_readers;
mod store_faults;
mod streaming;
mod streaming_gate;
mod tls;
mod updates;
mod web;
mod web_faults;
mod why;
