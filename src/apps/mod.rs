//! Applications that are plugins without speaking the plugin protocol: what their manifest says, and how the host talks to each kind.

pub(crate) mod cgi;
pub(crate) mod detect;
pub(crate) mod endpoint;
pub(crate) mod fastcgi;
pub(crate) mod http_connection;
pub(crate) mod manifest;
pub(crate) mod page_links;
pub(crate) mod prefix_settings;
pub(crate) mod probe;
pub(crate) mod static_files;
