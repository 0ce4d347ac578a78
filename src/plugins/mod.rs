//! Plugins: they are found, asked who they are, started and supervised, and their requests are queued and answered.

pub(crate) mod attempt;
pub(crate) mod connection;
pub(crate) mod context;
pub(crate) mod discovery;
pub(crate) mod host_names;
pub(crate) mod host_socket;
pub(crate) mod job;
pub(crate) mod launch;
pub(crate) mod page_request;
pub(crate) mod plugin;
pub(crate) mod process_state;
pub(crate) mod queue;
pub(crate) mod registry;
pub(crate) mod restart_policy;
pub(crate) mod routes;
pub(crate) mod scaling;
pub(crate) mod sockets;
pub(crate) mod start_turns;
pub(crate) mod supervisor;
pub(crate) mod worker;
