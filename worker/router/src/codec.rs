//! Protobuf in buffers that fit. tonic's own codec begins each call with 8 KiB each way, which no allocator has at hand.

use std::marker::PhantomData;

use prost::Message;
use tonic::codec::{BufferSettings, Codec};
use tonic_prost::{ProstCodec, ProstDecoder, ProstEncoder};

/// Of what comes; a larger message takes a larger one.
const DECODE_BYTES: usize = 1 << 10;
/// gRPC's own bytes before a message.
const PREFIX_BYTES: usize = 5;

/// For a call of one message, and answers that are mostly short.
#[derive(Debug)]
pub(crate) struct Fitting<T, U> {
    encode_bytes: usize,
    messages: PhantomData<(T, U)>,
}

impl<T: Message, U> Fitting<T, U> {
    pub(crate) fn to(message: &T) -> Self {
        Self { encode_bytes: PREFIX_BYTES + message.encoded_len(), messages: PhantomData }
    }
}

impl<T, U> Codec for Fitting<T, U>
where
    T: Message + Send + 'static,
    U: Message + Default + Send + 'static,
{
    type Encode = T;
    type Decode = U;
    type Encoder = ProstEncoder<T>;
    type Decoder = ProstDecoder<U>;

    fn encoder(&mut self) -> Self::Encoder {
        ProstCodec::<T, U>::raw_encoder(BufferSettings::new(self.encode_bytes, self.encode_bytes))
    }

    fn decoder(&mut self) -> Self::Decoder {
        ProstCodec::<T, U>::raw_decoder(BufferSettings::new(DECODE_BYTES, DECODE_BYTES))
    }
}
