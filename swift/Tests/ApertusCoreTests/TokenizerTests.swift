import Foundation
import Testing

@testable import ApertusCore

/// Texts of 160 languages and at random: the ids of the tokenizers library, and back.
@Suite struct TokenizerTests {
    @Test func idsAreTheLibrarys() throws {
        let folders = try Fixtures.folders("tokenizers")
        #expect(folders.count >= 2)
        for folder in folders {
            let tokenizer = try Tokenizer(folder: folder)
            let texts = try #require(
                try Fixtures.json("tokenizers/\(folder.lastPathComponent)/texts.json").items)
            #expect(texts.count > sized(5000, 600))
            var different = 0
            for entry in texts {
                let pair = try #require(entry.items)
                let text = try #require(pair[0].text)
                let wanted = try #require(pair[1].items).compactMap(\.int).map(Int32.init)
                let ids = tokenizer.encode(text)
                if ids != wanted || !tokenizer.decode(ids).utf8.elementsEqual(text.utf8) {
                    different += 1
                    if different < 4 { Issue.record("\(folder.lastPathComponent): \(text.debugDescription)") }
                }
            }
            #expect(different == 0, "\(folder.lastPathComponent): \(different) of \(texts.count)")
        }
    }

    @Test func streamsGiveTheWholeText() throws {
        for folder in try Fixtures.folders("tokenizers").prefix(2) {
            let tokenizer = try Tokenizer(folder: folder)
            for entry in try Fixtures.json("tokenizers/\(folder.lastPathComponent)/texts.json").items ?? [] {
                let text = entry.items?[0].text ?? ""
                var stream = try TextStream(tokenizer)
                var out = ""
                for id in tokenizer.encode(text) { out += stream.push(id) }
                out += stream.finish()
                #expect(out.utf8.elementsEqual(text.utf8))
            }
        }
    }

    @Test func stopTextsEndAStreamWhereverTokensAreCut() throws {
        let folder = try Fixtures.folder.appendingPathComponent("tokenizers/embedded")
        let tokenizer = try Tokenizer(folder: folder)
        for (stop, wanted) in [("\n\n", "Bern, dann"), ("dann", "Bern, "), ("xyz", nil), ("\n\nY", nil)] {
            var stream = try TextStream(tokenizer, stops: [stop])
            let text = "Bern, dann\n\nZurich"
            var out = ""
            for character in text { out += stream.push(tokenizer.encode(String(character))[0]) }
            out += stream.finish()
            #expect(out == wanted ?? text)
        }
        #expect(throws: ApertusError.self) { try TextStream(tokenizer, stops: [""]) }
    }

    @Test func bytesThatAreNoTextBecomeReplacements() throws {
        let folder = try Fixtures.folder.appendingPathComponent("tokenizers/embedded")
        let tokenizer = try Tokenizer(folder: folder)
        var rng = SystemRandomNumberGenerator()
        let byteIds = (UInt8.min ... UInt8.max).map { byte in
            (0 ..< Int32(tokenizer.size)).first {
                tokenizer.bytes(of: $0).elementsEqual([byte]) && !tokenizer.isSpecial($0)
            }!
        }
        for _ in 0 ..< 2000 {
            let pool: [UInt8] = [0x41, 0x80, 0xBF, 0xC2, 0xE0, 0xA0, 0xED, 0x9F, 0xF0, 0x90, 0xF4, 0x8F, 0xFF]
            let bytes = (0 ..< Int.random(in: 0 ... 9)).map { _ in pool.randomElement(using: &rng)! }
            var stream = try TextStream(tokenizer)
            var out = ""
            for byte in bytes { out += stream.push(byteIds[Int(byte)]) }
            out += stream.finish()
            #expect(out.utf8.elementsEqual(String(decoding: bytes, as: UTF8.self).utf8), "\(bytes)")
        }
    }
}
