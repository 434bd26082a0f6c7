import ApertusKit
import Testing

@Test func builds() {}
