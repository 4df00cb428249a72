//! The address that a request comes from: its peer's, or the client address that our proxies report if the peer is one
//! of them.
//!
//! Anyone can send `X-Forwarded-For`, so only what our own proxies have added to it counts. This module reads it from
//! the right; the first hop that is not ours is the client. It trusts one header only, because a proxy that writes one
//! header passes the other on unchanged.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::str::FromStr;

use axum::http::{HeaderMap, HeaderName, header};
use ipnet::IpNet;

use crate::process::settings::SettingsReader;

/// The address of the other end of a request's connection.
#[derive(Debug, Clone, Copy)]
pub struct Peer(pub IpAddr);

/// The proxies that are ours, and the header in which they report the client's address.
#[derive(Debug, Clone, Default)]
pub struct Proxies {
    trusted: Vec<IpNet>,
    header: ProxyHeader,
}

/// The header in which proxies report the client's address.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum ProxyHeader {
    /// `X-Forwarded-For: client, proxy`.
    #[default]
    XForwardedFor,
    /// RFC 7239: `Forwarded: for=client, for=proxy`.
    Forwarded,
}

impl fmt::Display for ProxyHeader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::XForwardedFor => "x-forwarded-for",
            Self::Forwarded => "forwarded",
        })
    }
}

impl FromStr for ProxyHeader {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.to_ascii_lowercase().as_str() {
            "x-forwarded-for" => Ok(Self::XForwardedFor),
            "forwarded" => Ok(Self::Forwarded),
            _ => Err("the headers are x-forwarded-for and forwarded"),
        }
    }
}

impl Proxies {
    /// Trusts the peers in these networks, and reads their reports from this header.
    #[must_use]
    pub fn new(trusted: Vec<IpNet>, header: ProxyHeader) -> Self {
        Self { trusted, header }
    }

    pub(crate) fn read(reader: &mut SettingsReader) -> Self {
        let text = reader.or("TRUSTED_PROXIES", String::new());
        let mut trusted = Vec::new();
        for network in text.split(',').map(str::trim).filter(|network| !network.is_empty()) {
            match network.parse().or_else(|_| network.parse::<IpAddr>().map(IpNet::from)) {
                Ok(network) => trusted.push(network),
                Err(_) => reader.fault(format!(
                    "TRUSTED_PROXIES names {network}; it takes addresses and networks such as 10.0.0.0/8, with commas between them"
                )),
            }
        }
        Self { trusted, header: reader.or("TRUSTED_PROXY_HEADER", ProxyHeader::default()) }
    }

    /// The address that limits count the request for. An IPv6 client has a network of 2^64 addresses, so the whole
    /// network counts as one client.
    #[must_use]
    pub fn client(&self, peer: IpAddr, headers: &HeaderMap) -> IpAddr {
        let mut client = peer.to_canonical();
        if !self.trusted.is_empty() {
            for hop in self.hops(headers) {
                if !self.trusts(client) {
                    break;
                }
                // Our proxy did not write an address here, so the caller behind it is unknown.
                let Some(hop) = hop else { break };
                client = hop;
            }
        }
        match client {
            IpAddr::V4(_) => client,
            IpAddr::V6(address) => {
                let [a, b, c, d, ..] = address.segments();
                IpAddr::V6(Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0))
            }
        }
    }

    fn trusts(&self, address: IpAddr) -> bool {
        self.trusted.iter().any(|network| network.contains(&address))
    }

    /// The hops that the header names, the nearest first. `None` stands for a hop that is not an address.
    fn hops<'a>(&self, headers: &'a HeaderMap) -> impl Iterator<Item = Option<IpAddr>> + use<'a> {
        const X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
        let (name, address_of): (_, fn(&str) -> Option<IpAddr>) = match self.header {
            ProxyHeader::XForwardedFor => (X_FORWARDED_FOR, address),
            ProxyHeader::Forwarded => (header::FORWARDED, forwarded_for),
        };
        let mut lines: Vec<&str> = headers.get_all(name).iter().map(|line| line.to_str().unwrap_or_default()).collect();
        lines.reverse();
        lines.into_iter().flat_map(|line| line.rsplit(',')).map(move |hop| address_of(hop.trim()))
    }
}

/// Reads the address of a hop such as `for=192.0.2.1;proto=https`. The address may be quoted.
fn forwarded_for(hop: &str) -> Option<IpAddr> {
    hop.split(';').find_map(|pair| {
        let (name, value) = pair.split_once('=')?;
        name.trim().eq_ignore_ascii_case("for").then(|| address(value.trim().trim_matches('"')))?
    })
}

/// Reads an address, with or without a port.
fn address(text: &str) -> Option<IpAddr> {
    let bare = text.trim_start_matches('[').trim_end_matches(']');
    let address = bare.parse().ok().or_else(|| text.parse().ok().map(|address: SocketAddr| address.ip()));
    address.map(|address| address.to_canonical())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn client(header: ProxyHeader, peer: &str, lines: &[&str]) -> String {
        let trusted = ["10.0.0.0/8", "2001:db8:1::/48"].map(|network| network.parse().unwrap());
        let mut headers = HeaderMap::new();
        for line in lines {
            let name = if header == ProxyHeader::Forwarded { "forwarded" } else { "x-forwarded-for" };
            headers.append(name, line.parse().unwrap());
        }
        Proxies::new(trusted.to_vec(), header).client(peer.parse().unwrap(), &headers).to_string()
    }

    #[test]
    fn only_what_our_own_proxies_have_added_counts() {
        let by = |peer, lines: &[&str]| client(ProxyHeader::XForwardedFor, peer, lines);
        assert_eq!(by("192.0.2.1", &["198.51.100.7"]), "192.0.2.1", "the peer is not a proxy of ours");
        assert_eq!(by("10.0.0.1", &["198.51.100.7"]), "198.51.100.7");
        assert_eq!(by("10.0.0.1", &["1.1.1.1, 198.51.100.7, 10.0.0.2"]), "198.51.100.7", "1.1.1.1 is invented");
        assert_eq!(by("10.0.0.1", &["1.1.1.1", "198.51.100.7"]), "198.51.100.7", "two lines are one");
        assert_eq!(by("10.0.0.1", &["198.51.100.7:443"]), "198.51.100.7");
        assert_eq!(by("10.0.0.1", &["1.1.1.1, unknown"]), "10.0.0.1", "nothing behind an unknown hop is trusted");
        assert_eq!(by("10.0.0.1", &[]), "10.0.0.1");
        assert_eq!(by("::ffff:10.0.0.1", &["::ffff:198.51.100.7"]), "198.51.100.7");
    }

    #[test]
    fn an_ipv6_network_is_one_client() {
        let by = |line| client(ProxyHeader::XForwardedFor, "2001:db8:1::5", &[line]);
        assert_eq!(by("2001:db8:7:8:9::1"), "2001:db8:7:8::");
        assert_eq!(by("[2001:db8:7:8::2]:80"), "2001:db8:7:8::");
    }

    #[test]
    fn the_standard_header_is_read_where_it_is_the_one_that_counts() {
        let by = |line| client(ProxyHeader::Forwarded, "10.0.0.1", &[line]);
        assert_eq!(by("for=1.1.1.1, for=198.51.100.7;proto=https"), "198.51.100.7");
        assert_eq!(by("For=\"[2001:db8:7:8::2]:4711\""), "2001:db8:7:8::");
        assert_eq!(by("for=_hidden"), "10.0.0.1");
        let mut headers = HeaderMap::new();
        headers.insert("forwarded", "for=1.1.1.1".parse().unwrap());
        let proxies = Proxies::new(vec!["10.0.0.0/8".parse().unwrap()], ProxyHeader::XForwardedFor);
        assert_eq!(proxies.client("10.0.0.1".parse().unwrap(), &headers).to_string(), "10.0.0.1");
    }
}
