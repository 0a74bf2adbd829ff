//! The body of a call that tells its end with its last frame.
//!
//! tonic's own tells it only when it is asked for one frame more, and HTTP/2 then sends that end as an empty frame, in a
//! write and a packet of its own.

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use http_body::{Body as _, Frame};
use tonic::{Status, body::Body};

/// A body that has been asked for the frame after the one that it gives.
#[derive(Debug)]
pub(crate) struct Ahead {
    body: Body,
    next: Option<Result<Frame<Bytes>, Status>>,
    has_ended: bool,
}

impl Ahead {
    pub(crate) fn of(body: Body) -> Body {
        Body::new(Self { body, next: None, has_ended: false })
    }

    fn poll_body(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if self.has_ended {
            return Poll::Ready(None);
        }
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        self.has_ended = frame.is_none();
        Poll::Ready(frame)
    }
}

impl http_body::Body for Ahead {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let frame = match self.next.take() {
            Some(frame) => Some(frame),
            None => ready!(self.poll_body(cx)),
        };
        if let Poll::Ready(next) = self.poll_body(cx) {
            self.next = next;
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.has_ended && self.next.is_none()
    }
}

#[cfg(test)]
mod tests {
    use std::task::Waker;

    use futures::stream;
    use http_body_util::StreamBody;

    use super::*;

    #[test]
    fn the_end_is_known_with_the_last_frame() {
        let frames = ["a", "b"].map(|text| Ok::<_, Status>(Frame::data(Bytes::from(text))));
        let mut body = Ahead::of(Body::new(StreamBody::new(stream::iter(frames))));
        let mut cx = Context::from_waker(Waker::noop());
        let mut next = || {
            let Poll::Ready(frame) = Pin::new(&mut body).poll_frame(&mut cx) else { panic!("all frames are there") };
            (frame.map(|frame| frame.unwrap().into_data().unwrap()), body.is_end_stream())
        };
        assert_eq!(next(), (Some("a".into()), false));
        assert_eq!(next(), (Some("b".into()), true));
        assert_eq!(next(), (None, true));
    }
}
