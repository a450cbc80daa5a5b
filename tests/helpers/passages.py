"""Twelve passages each in simplified and traditional Chinese, Japanese and Korean, of different registers."""

from __future__ import annotations

SIMPLIFIED = (
    "气象台今天上午发布消息，受冷空气影响，未来三天我市气温将下降八到十度，并伴有五级北风，请市民注意添衣保暖。",
    "他推开木门，院子里落满了桂花。母亲坐在石凳上择菜，头也不抬地说：“回来了？锅里给你留着饭。”",
    "第十二条　出租人应当按照约定将租赁物交付承租人，并在租赁期限内保持租赁物符合约定的用途。",
    "把面粉倒进盆里，加一小撮盐和温水，揉成光滑的面团，盖上湿布，醒二十分钟，再擀成薄皮。",
    "孤灯照壁，寒雨敲窗。故人一去三千里，锦书难寄，空余满袖清霜；醉里拔剑，醒后但闻更漏。",
    "甲：你那台电脑修好了没有？乙：别提了，换了块硬盘，资料全没了，老板说最多赔我八十块钱。",
    "细胞膜由磷脂双分子层和嵌在其中的蛋白质组成，它选择性地允许水、离子和小分子有机物通过。",
    "今年第三季度，公司实现营业收入十二亿四千万元，同比增长百分之九点三，净利润略有下降。",
    "小猴子爬上树，摘了一个又大又圆的桃子，自己舍不得吃，先捧去给生病的奶奶尝一口。",
    "请先关闭电源，再拔下插头；清洗滤网时不要使用汽油、酒精等挥发性溶剂，晾干以后才能装回机器。",
    "苏州的园林讲究移步换景：廊是弯的，墙上开着漏窗，隔着芭蕉望过去，池塘、假山、亭子层层叠叠。",
    "这部手机的屏幕还不错，电池却撑不过一天，拍照时偶尔发热，总的来说对得起这个价格，给四颗星。",
)

TRADITIONAL = (
    "氣象署表示，受東北季風增強影響，北部及東北部地區天氣轉涼，早晚溫差較大，外出請記得攜帶雨具。",
    "阿嬤把曬乾的蘿蔔收進甕裡，抬頭看看天色，喃喃地說：「等一下會落雨，趕快把衣服收進來。」",
    "第八條　勞工每日正常工作時間不得超過八小時，雇主如有延長工作時間之必要，應經工會同意。",
    "將豬肉切成薄片，用醬油、米酒和太白粉醃十五分鐘，熱鍋後爆香蒜頭，轉大火快炒三分鐘即可起鍋。",
    "庭院深深，簾幕無重數。雁過樓頭，一聲淒切；憑欄人遠，雲山萬疊，誰與溫酒話黃昏？",
    "「你坐捷運還是騎車來的？」「捷運啊，今天颳這麼大的風，誰敢騎車過橋，帽子都會被吹到河裡去。」",
    "行星繞著太陽運行的軌道是橢圓形，太陽位於其中一個焦點上，距離愈近，行星移動的速度就愈快。",
    "本季營業收入為新臺幣三十六億元，較去年同期成長百分之七，主要來自海外訂單與匯率變動的貢獻。",
    "從前有一隻小烏龜，牠每天背著重重的殼去上學，同學都笑牠走得慢，只有小兔子願意等牠一起回家。",
    "使用前請詳閱說明書。本產品不可浸入水中，清潔時請以擰乾的軟布擦拭，並置於孩童無法觸及之處。",
    "老街兩旁盡是紅磚騎樓，賣茶葉、賣糕餅、賣木屐的店鋪一間挨著一間，傍晚時分燈籠全都亮了起來。",
    "這家餐廳的牛肉麵湯頭濃郁，麵條卻煮得太軟，服務人員態度親切，假日人潮眾多，建議先打電話訂位。",
)

JAPANESE = (
    "気象庁によりますと、明日は高気圧に覆われて全国的に晴れますが、朝晩は冷え込む見込みです。",
    "彼女は駅のホームで手紙を握りしめたまま、最後の列車が見えなくなるまで立ち尽くしていた。",
    "第五条　賃借人は、賃貸人の書面による承諾を得なければ、賃借権を譲渡してはならない。",
    "玉ねぎを薄切りにして、バターでゆっくり炒めます。きつね色になったら水とコンソメを加えて煮込みましょう。",
    "「もう帰っちゃうの？」「うん、明日テストだから。数学のノート、あとで写真に撮って送ってくれない？」",
    "光合成とは、植物が光のエネルギーを使って二酸化炭素と水から糖と酸素を作り出す反応のことである。",
    "当社の第三四半期の売上高は前年同期比で八パーセント増加し、過去最高を更新しました。",
    "むかしむかし、ある村に、正直なおじいさんと、よくばりなおじいさんが住んでおりました。",
    "ご使用の前に必ず取扱説明書をお読みください。濡れた手でプラグに触れると感電するおそれがあります。",
    "古い町並みを歩いていると、どこからか味噌の香りがして、細い路地の奥に小さな食堂の灯りが見えた。",
    "このカメラは軽くて持ち運びやすいけれど、バッテリーの減りが早いのが残念。画質には満足しています。",
    "来週の会議は木曜日の午後二時から、三階の大会議室で行います。資料は前日までに共有してください。",
)

KOREAN = (
    "기상청은 오늘 밤부터 전국에 비가 내리고 내일 아침 기온이 크게 떨어지겠다고 예보했습니다.",
    "그는 오래된 우물가에 앉아 어머니의 편지를 다시 읽었다. 바람이 불 때마다 감나무 잎이 하나씩 떨어졌다.",
    "제삼조 임차인은 임대인의 동의 없이 그 권리를 양도하거나 임차물을 전대하지 못한다.",
    "양파를 얇게 썰고 간장과 설탕, 다진 마늘을 넣어 고기를 재운 다음 센 불에서 빠르게 볶아 주세요.",
    '"벌써 집에 가?" "응, 내일 시험이 있어서 공부해야 해. 수학 공책 좀 빌려줄 수 있어?"',
    "식물은 햇빛을 이용하여 이산화탄소와 물로부터 포도당과 산소를 만드는데 이를 광합성이라고 한다.",
    "회사의 올해 삼분기 매출은 지난해 같은 기간보다 팔 퍼센트 늘어 역대 최고를 기록했다.",
    "옛날 옛적 깊은 산골에 마음씨 착한 나무꾼과 늙은 어머니가 살고 있었습니다.",
    "사용하기 전에 설명서를 반드시 읽어 주십시오. 젖은 손으로 전원 플러그를 만지면 감전될 수 있습니다.",
    "골목을 돌아서자 된장찌개 냄새가 풍겨 왔고 작은 식당의 불빛이 빗물에 젖은 길을 비추고 있었다.",
    "이 카메라는 가볍고 쓰기 편하지만 배터리가 빨리 닳는 점이 아쉽네요. 화질은 아주 만족합니다.",
    "다음 주 회의는 목요일 오후 두 시에 삼층 회의실에서 열립니다. 자료는 전날까지 보내 주세요.",
)

SIZES = (40, 60, 80, 120, 200, 300, 500, 800, 1200, 2000, 3000, 4000)
"""Bytes of the twelve texts in each encoding."""


def text_of_size(passages: tuple[str, ...], number: int, size: int, encoding: str) -> bytes:
    """A text of so many bytes at most, of whole characters: passages from one on, a line each."""
    text = "\n".join(passages[(number + place) % len(passages)] for place in range(len(passages)))
    text = "\n".join([text] * 4)[: size + 1]
    while len(data := text.encode(encoding)) > size:
        text = text[: -max(1, (len(data) - size) // 4)]
    return data


ENCODINGS = {
    "gb2312": (SIMPLIFIED, ""),
    "gbk": (SIMPLIFIED, "镕堃喆珺"),
    "gb18030": (SIMPLIFIED, "㐂𠮷镕"),
    "gb18030, traditional": (TRADITIONAL, ""),
    "hz": (SIMPLIFIED, ""),
    "big5": (TRADITIONAL, ""),
    "cp950": (TRADITIONAL, "裏碁恒銹"),
    "big5hkscs": (TRADITIONAL, "嘅喺啲咗冇嘢"),
    "euc_jp": (JAPANESE, ""),
    "euc_jis_2004": (JAPANESE, "①②"),
    "shift_jis": (JAPANESE, ""),
    "cp932": (JAPANESE, "①㈱髙﨑"),
    "shift_jis_2004": (JAPANESE, "①㈱"),
    "iso2022_jp": (JAPANESE, ""),
    "euc_kr": (KOREAN, ""),
    "cp949": (KOREAN, "똠뷁펲"),
    "johab": (KOREAN, ""),
    "iso2022_kr": (KOREAN, ""),
    "utf-8": (SIMPLIFIED, ""),
    "utf-8-sig": (TRADITIONAL, ""),
    "utf-16": (SIMPLIFIED, ""),
    "utf-16-le": (SIMPLIFIED, ""),
    "utf-16-be": (TRADITIONAL, ""),
    "utf-32": (JAPANESE, ""),
    "utf-32-le": (SIMPLIFIED, ""),
    "utf-32-be": (KOREAN, ""),
}
"""The encodings of the table, each with passages and with characters that only it has among its relatives."""
CHINESE = [name for name, (passages, _) in ENCODINGS.items() if passages in (SIMPLIFIED, TRADITIONAL)]


def texts_in(name: str) -> list[bytes]:
    """The twelve texts of one row of the table; a vendor's own characters stand in the first words of each passage."""
    passages, own = ENCODINGS[name]
    marked = tuple(passage[:6] + own + passage[6:] for passage in passages)
    encoding = name.partition(",")[0]
    return [text_of_size(marked, number, size, encoding) for number, size in enumerate(SIZES)]
