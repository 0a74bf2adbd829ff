//! Which addresses a hub may send us to.

use std::{
    io,
    net::{IpAddr, SocketAddr},
};

use reqwest::{
    Url,
    dns::{Addrs, Name, Resolve, Resolving},
};

/// Where an address is, as far as it matters here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Class {
    Loopback,
    Link,
    Other,
}

/// The class of an address, whatever notation hides it.
fn class(address: IpAddr) -> Class {
    match address.to_canonical() {
        IpAddr::V4(v4) if v4.is_loopback() || v4.is_unspecified() => Class::Loopback,
        IpAddr::V4(v4) if v4.is_link_local() || v4.is_broadcast() || v4.is_multicast() => Class::Link,
        IpAddr::V6(v6) if v6.is_loopback() || v6.is_unspecified() => Class::Loopback,
        // fd00:ec2::254 is a cloud's metadata service, like 169.254.169.254
        IpAddr::V6(v6) if v6.is_unicast_link_local() || v6.is_multicast() || v6.segments()[..2] == [0xfd00, 0x0ec2] => {
            Class::Link
        }
        _ => Class::Other,
    }
}

/// The class of an endpoint that is a literal address or `localhost`.
pub(super) fn own_class(endpoint: &Url) -> Class {
    let host = endpoint.host_str().unwrap_or_default();
    match host.trim_start_matches('[').trim_end_matches(']').parse() {
        Ok(address) => class(address),
        Err(_) if host == "localhost" => Class::Loopback,
        Err(_) => Class::Other,
    }
}

/// Whether a hub that is itself in class `own` may send us to an address.
pub(super) fn may_visit(address: IpAddr, own: Class) -> bool {
    let class = class(address);
    class == Class::Other || class == own
}

/// Resolves names, and leaves out addresses that must not be visited: whatever a name says, it is checked here.
pub(super) struct Guard {
    /// The endpoint's own host is not checked: it was configured.
    pub(super) trusted: String,
    /// The endpoint's class, if it is a literal address.
    pub(super) own: Class,
}

/// All addresses of a name are inside.
#[derive(Debug, thiserror::Error)]
#[error("the name leads to an address inside")]
pub(super) struct Forbidden;

impl Resolve for Guard {
    fn resolve(&self, name: Name) -> Resolving {
        let (host, own) = (name.as_str().to_owned(), self.own);
        let trusted = host == self.trusted;
        Box::pin(async move {
            let found = tokio::net::lookup_host((host.as_str(), 0)).await?;
            let allowed: Vec<SocketAddr> = found.filter(|address| trusted || may_visit(address.ip(), own)).collect();
            if allowed.is_empty() {
                return Err(io::Error::other(Forbidden).into());
            }
            Ok(Box::new(allowed.into_iter()) as Addrs)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_inside_are_visited_only_by_a_hub_that_is_inside() {
        let table = [
            ("169.254.169.254", Class::Link),
            ("::ffff:169.254.169.254", Class::Link),
            ("fe80::1", Class::Link),
            ("fd00:ec2::254", Class::Link),
            ("127.0.0.1", Class::Loopback),
            ("::1", Class::Loopback),
            ("0.0.0.0", Class::Loopback),
            ("10.1.2.3", Class::Other),
            ("2606:4700::1", Class::Other),
        ];
        for (address, expected) in table {
            let address: IpAddr = address.parse().unwrap();
            assert_eq!(class(address), expected, "{address}");
            assert_eq!(may_visit(address, Class::Other), expected == Class::Other, "{address}");
        }
        assert!(may_visit("127.0.0.1".parse().unwrap(), Class::Loopback));
        assert!(!may_visit("169.254.169.254".parse().unwrap(), Class::Loopback));
    }
}
